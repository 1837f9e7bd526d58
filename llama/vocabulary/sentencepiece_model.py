"""Read SentencePiece models, the tokenizer.model of Llama 1 and 2, Code Llama and Mistral."""

from pathlib import Path

from llama.vocabulary.backend import STEP, TokenizerError


class SentencePieceBackend:
    """A `Backend` with a SentencePieceProcessor. Raises TokenizerError."""

    def __init__(self, path: Path):
        from sentencepiece import SentencePieceProcessor

        try:
            self.model = SentencePieceProcessor(model_file=str(path))
            self.n_words: int = self.model.vocab_size()
            self.unk_id: int = self.model.unk_id()
            names = self.model.id_to_piece(list(range(self.n_words)))
            self.model.decode([self.unk_id])  # unk's text is stored outside the pieces; it may be damaged too
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{path} holds a piece that is not UTF-8, fetch it again") from error
        except (OSError, RuntimeError, IndexError) as error:
            raise TokenizerError(f"{path} is not a SentencePiece model, fetch it again") from error
        self.bos_id: int = self.model.bos_id()
        self.eos_id: int = self.model.eos_id()
        self.pad_id: int = self.model.pad_id()
        self.adds_bos = self.bos_id >= 0
        self.unsettled_ids: set[int] = set()
        self.rstrip_ids: set[int] = set()
        self.special_ids: dict[str, int] = {name: i for i, name in enumerate(names) if self.model.is_control(i)}
        self.chat_format: str | None = "llama2" if self.find(STEP) is None else "codellama-70b"

    def normalize(self, s: str) -> str:
        return self.model.normalize(s)

    def encode(self, s: str) -> list[int]:
        return self.model.encode(s)

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids)

    def piece(self, token: int) -> str:
        name: str = self.model.id_to_piece(token)
        if self.model.is_byte(token):  # named <0x0A>
            byte = int(name[3:-1], 16)
            return chr(byte) if byte < 128 else name
        return name.replace("\N{LOWER ONE EIGHTH BLOCK}", " ")

    def token_bytes(self, token: int) -> bytes:
        if self.model.is_control(token):
            return b""
        name: str = self.model.id_to_piece(token)
        if self.model.is_byte(token):
            return bytes([int(name[3:-1], 16)])
        return self.decode([token]).encode() if token == self.unk_id else self.piece(token).encode()

    def find(self, piece: str) -> int | None:
        found: int = self.model.piece_to_id(piece)  # unk_id if there is no such piece
        return found if self.model.id_to_piece(found) == piece else None
