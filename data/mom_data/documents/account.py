"""The account of raw input: it counts what became of every member of every file, and checks that the sums agree.

A *member* is an entry of a tar (a file, folder or link in it) or a line of a JSON-lines file. Each member is either
used, and counted by the kind of content that was taken from it, or left out, and counted by a reason and its
extension. A *sample* is all members of one key. It either becomes a document or is left out as a whole, and then all
its members are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

# The reasons why a member or a sample is left out. Each says what was found, and in parentheses what the user can do.
# The details of one sample may follow after a colon. The first group, AS_MEANT, is what the corpus or the user intends;
# every other reason counts against --max-bad-fraction. Finished parts store these texts, and later versions read them,
# so a text of the first group must stay as it is.
DIRECTORY = "a folder"
SYSTEM = "a hidden or system file"
SIDECAR = "metadata beside a sample"
ANOTHER_TEXT = "another text of a sample whose text was taken"
BLANK = "a blank line"
EMPTY = "empty"
TOO_LARGE = "above the limits"
OTHER_SIDE = "on the other side of the split"
DROPPED = "of a dropped modality"
IGNORED = "of an extension to ignore"
AS_MEANT = frozenset({DIRECTORY, SYSTEM, SIDECAR, ANOTHER_TEXT, BLANK, EMPTY, TOO_LARGE, OTHER_SIDE, DROPPED, IGNORED})
# Members that were never meant to be in the data set. The share of bad members is computed without them.
NOT_WANTED = AS_MEANT - {SIDECAR, ANOTHER_TEXT, TOO_LARGE}

NO_EXTENSION = "a file whose name has no extension, so that its format is not known (give it one)"
NOT_READ = "a format that is not read (convert or unpack the file)"
UNKNOWN = "content that is not recognised (give the file a known extension, or leave it out with --ignore)"
EMPTY_MEMBER = "a picture or recording of 0 bytes (fetch it again)"
NOT_NAMED = "a file that the JSON of its document does not name (add it to the JSON, or remove it)"
FURTHER = "a picture or recording beside those that were taken (a JSON with segments can order them all)"
SEVERAL = "several files where one is expected (rename those of other samples, or order them in a JSON)"
NO_TEXT = "a JSON that may hold a text, but under none of the expected keys (name its key with --text-key)"
ALONE = "a caption or transcript without its picture or recording (store both in a tar under one key)"
LINK = "a link that leads to no file of its tar (store the file itself)"
PACKED_LINK = "a link inside a compressed tar (unpack the tar first)"
SPECIAL = "a special file, such as a device (remove it from the tar)"
SPARSE = "a sparse file (make the tar without --sparse)"
PICKLE = "Python objects, which could run code (store plain files instead)"
UNREADABLE = "cannot be read"
BESIDE = "a file of a sample that is left out because of another of its files"

MISSING = "pictures that web pages name but that are not in their tar"


def category(reason: str) -> str:
    """The general part of a reason: what stands before its first colon, without the details of one sample."""
    return reason.split(":")[0]


def is_damage(reason: str) -> bool:
    """Whether this reason means damaged or not understood, which counts against the allowed share of bad members.
    Otherwise the corpus or the user intends the member to be left out."""
    return category(reason) not in AS_MEANT


class Member(NamedTuple):
    """A member of a sample and what became of it. Where it is used, `kind` says what was taken from it: a modality, or
    "json" for a JSON file that orders or describes a document. Where it is left out, `reason` says why."""

    name: str
    extension: str
    kind: str | None = None
    reason: str | None = None


@dataclass
class Account:
    """Sums over any number of files. Members are counted once when they are met, and again by use or reason when it is
    decided what becomes of them; `check` compares the two counts."""

    members: int = 0
    used: Counter[str] = field(default_factory=Counter)
    left_out: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Members left out, by (reason, extension)."""
    samples: int = 0
    documents: int = 0
    samples_left_out: Counter[str] = field(default_factory=Counter)
    missing: Counter[str] = field(default_factory=Counter)
    """Pictures that documents name but that do not exist. They are not members, so no sum above contains them."""
    files: int = 0
    files_left_out: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Files of input folders that are not read, by (reason, extension)."""
    examples: dict[str, str] = field(default_factory=dict)
    """The name of the first member or file met for each reason and extension."""

    def leave(self, name: str, extension: str, reason: str) -> None:
        """Count a member as left out for a reason."""
        self.left_out[reason, extension] += 1
        self.examples.setdefault(f"{reason} {extension}", _printable(name))

    def leave_file(self, path: Path, reason: str) -> None:
        """Count a file of an input folder as not read for a reason."""
        extension = shown(path.name)
        self.files_left_out[reason, extension] += 1
        self.examples.setdefault(f"file: {reason} {extension}", _printable(str(path)))

    def lose(self, names: Iterable[str]) -> None:
        """Count pictures that a document names but that do not exist."""
        for name in names:
            self.missing[MISSING] += 1
            self.examples.setdefault(MISSING, _printable(name))

    def sample(self, source: str, members: Iterable[Member], reason: str | None, guilty: str | None = None) -> None:
        """Count a sample and its members.

        Without a `reason` the sample has become a document. With one, all its members are left out for that reason.
        Where the reason is damage and `guilty` names the member that causes it, the other members are counted as
        BESIDE instead.
        """
        self.samples += 1
        if reason is None:
            self.documents += 1
        else:
            self.samples_left_out[category(reason)] += 1
        for member in members:
            why = member.reason
            if why is None and reason is not None:
                blamed = guilty is None or guilty == member.name or not is_damage(reason)
                why = category(reason) if blamed else BESIDE
            if why is None:
                self.used[member.kind or "json"] += 1
            else:
                self.leave(f"{source}: {member.name}", member.extension, why)

    def add(self, other: Account) -> None:
        """Add the sums of another account to this one."""
        self.members += other.members
        self.samples += other.samples
        self.documents += other.documents
        self.files += other.files
        for name in ("used", "left_out", "samples_left_out", "missing", "files_left_out"):
            getattr(self, name).update(getattr(other, name))
        self.examples = other.examples | self.examples

    def check(self) -> None:
        """Raises AssertionError where the sums do not agree. Then the program has lost a member, which is a bug."""
        fates = self.used.total() + self.left_out.total()
        assert self.members == fates, f"{self.members} members were met, and {fates} are accounted for"
        fates = self.documents + self.samples_left_out.total()
        assert self.samples == fates, f"{self.samples} samples were met, and {fates} are accounted for"

    @property
    def bad_members(self) -> tuple[int, int]:
        """(members left out as damaged or not understood, all members meant to be in the data set)."""
        bad = sum(n for (reason, _), n in self.left_out.items() if is_damage(reason))
        return bad, self.members - sum(n for (reason, _), n in self.left_out.items() if reason in NOT_WANTED)

    @property
    def bad_samples(self) -> tuple[int, int]:
        """(samples left out as damaged or not understood, all samples meant to be in the data set)."""
        bad = sum(n for reason, n in self.samples_left_out.items() if is_damage(reason))
        return bad, self.samples - sum(n for reason, n in self.samples_left_out.items() if reason in NOT_WANTED)

    @property
    def bad_files(self) -> tuple[int, int]:
        """(unread files of input folders that may hold data, the sum of these and of the files that are read)."""
        bad = sum(n for (reason, _), n in self.files_left_out.items() if is_damage(reason))
        return bad, bad + self.files

    def as_json(self) -> dict[str, Any]:
        """The account as plain values for JSON, the most frequent reasons first. `from_json` is the inverse."""
        self.check()

        def table(counts: Counter[tuple[str, str]], prefix: str, what: str) -> list[dict[str, Any]]:
            return [
                {"reason": reason, "extension": extension, what: n, "bad": is_damage(reason),
                 "example": self.examples[f"{prefix}{reason} {extension}"]}
                for (reason, extension), n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
            ]  # fmt: skip

        return {
            "members": self.members,
            "used": dict(sorted(self.used.items())),
            "left_out": table(self.left_out, "", "members"),
            "samples": self.samples,
            "documents": self.documents,
            "samples_left_out": dict(sorted(self.samples_left_out.items(), key=lambda item: (-item[1], item[0]))),
            "missing": [{"what": w, "pictures": n, "example": self.examples[w]} for w, n in self.missing.items()],
            "files": self.files,
            "files_left_out": table(self.files_left_out, "file: ", "files"),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Account:
        account = cls(
            value["members"], Counter(value["used"]), Counter(), value["samples"], value["documents"],
            Counter(value["samples_left_out"]), files=value["files"],
        )  # fmt: skip
        for counts, prefix, what, rows in (
            (account.left_out, "", "members", value["left_out"]),
            (account.files_left_out, "file: ", "files", value["files_left_out"]),
        ):
            for row in rows:
                counts[row["reason"], row["extension"]] = row[what]
                account.examples[f"{prefix}{row['reason']} {row['extension']}"] = row["example"]
        for row in value["missing"]:
            account.missing[row["what"]] = row["pictures"]
            account.examples[row["what"]] = row["example"]
        return account

    def text(self) -> str:
        """The account as lines of text for people."""
        value = self.as_json()
        used = ", ".join(f"{n:,} {kind}" for kind, n in value["used"].items()) or "none"
        lines = [
            f"members in: {value['members']:,} in {value['files']:,} files",
            f"  used: {sum(value['used'].values()):,} ({used})",
            f"  left out: {self.left_out.total():,}",
            *(_line(row, "members") for row in value["left_out"]),
            f"samples: {value['samples']:,}",
            f"  documents out: {value['documents']:,}",
            *(f"  left out, {reason}: {n:,}" for reason, n in value["samples_left_out"].items()),
            *(f"{row['what']}: {row['pictures']:,}, e.g. {row['example']}" for row in value["missing"]),
        ]
        if value["files_left_out"]:
            lines += ["files of input folders that are not read:"]
            lines += [_line(row, "files") for row in value["files_left_out"]]
        return "\n".join(lines)

    def worst(self) -> str:
        """The four most frequent kinds of bad members, most frequent first, for an error message."""
        rows = [row for row in self.as_json()["left_out"] if row["bad"]]
        return "; ".join(_line(row, "members").strip() for row in rows[:4])


def _line(row: Mapping[str, Any], what: str) -> str:
    bad = "" if row["bad"] else " (as meant)"
    return f"    {row[what]:,} {row['extension'] or 'without extension'}: {row['reason']}{bad}, e.g. {row['example']}"


def _printable(name: str) -> str:
    """The name with backslash escapes for bytes that are not valid characters, which names in a tar may contain."""
    return name.encode("utf-8", "backslashreplace").decode()


def shown(name: str) -> str:
    """The extension of a file's name as the account shows it: the last one in lower case. A compressed file also
    shows the extension before it, as in ".tar.gz". A name without an extension gives ""."""
    parts = _printable(name).rpartition("/")[2].lower().lstrip(".").split(".")
    if len(parts) > 2 and parts[-1] in ("gz", "bz2", "xz", "zst", "lz4"):
        return f".{parts[-2]}.{parts[-1]}"
    return f".{parts[-1]}" if len(parts) > 1 else ""
