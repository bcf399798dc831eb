"""Keys that cannot be wrong in silence: every run's config is held against its bundle's schema before any work.

``configs/keys.json`` of a bundle says of every key its type, its range and what it is for. It is the one source of this
check and of ``docs/keys.md``, which

    python -m custom_components.run.keys bundles/*

writes. Each of its sections ``train``, ``inference``, ``prepare``, ... maps the keys of the config of that name, and of
that config's overlays, to a JSON Schema each; what another section says of a key holds where a section names it not.
``parts`` are the ids that a config is built of, and ``arguments`` the arguments of components that people change.
"""

import argparse
import ast
import difflib
import functools
import inspect
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pydoc import locate
from traceback import walk_stack
from typing import Any

import numpy as np
import torch
from custom_components.errors import InputError
from custom_components.files import replacing
from custom_components.run.description import plain
from fire.parser import DefaultParseValue
from jsonschema import Draft202012Validator, TypeChecker, ValidationError, validators
from monai.bundle import ConfigComponent, ConfigParser, ConfigWorkflow, ReferenceResolver
from monai.bundle.scripts import create_workflow
from monai.bundle.utils import DEFAULT_EXP_MGMT_SETTINGS, EXPR_KEY, ID_REF_KEY, ID_SEP_KEY, MACRO_KEY, MERGE_KEY

SCHEMA = "keys.json"
OWN = "my_"  # a person's own keys begin so
WHERE = f"(docs/keys.md lists all; a key of your own begins with {OWN})"
WORDS = {"null": None, "true": True, "false": False}  # JSON's, which the command line takes for text
ARGUMENTS = frozenset(inspect.signature(ConfigWorkflow).parameters) | {"args_file", "workflow_name"}  # MONAI's own
TRACKING = {key for settings in DEFAULT_EXP_MGMT_SETTINGS.values() for key in settings["configs"]}
RESERVED = {"imports", "initialize", "run", "finalize", ConfigParser.meta_key} | TRACKING
UNSAFE = (EXPR_KEY, ID_REF_KEY, MACRO_KEY)  # what MONAI evaluates where a text begins with it
FLAG = re.compile("--|-[A-Za-z]")  # as fire tells flags from values
OTHERS = {"atMostKey": "at most", "multipleOfKey": "a multiple of"}  # keywords that name another key
DECIDES = "decidesKeys"  # the keyword of keys that, in one file with this one, hold for its value there and no other
SECTIONS = ("parts", "arguments")
OF_WEIGHTS = re.compile(r"\$@described\.get\('\w+', (.+)\)")


# the run


@dataclass
class Running:
    """The config that runs now, and what a person gave for it, as far as MONAI's frames tell.

    Args:
        parser: holds the merged config, with references as they are written.
        names: ids of the workflow that may have any name, such as ``run_id``.
        files: the config files, where ``create_workflow``, thus ``run`` too, made the workflow; else None.
        given: keys given beside them, as MONAI took them.
        asked: the same before MONAI took them, with those given as None, which it drops.
        spoken: of the command line, key -> the text that a person wrote.
    """

    parser: ConfigParser
    names: frozenset[str] = frozenset()
    root: Path | None = None
    files: tuple[str, ...] | None = None
    given: Mapping[str, Any] = field(default_factory=dict)
    asked: Mapping[str, Any] = field(default_factory=dict)
    spoken: Mapping[str, str] = field(default_factory=dict)


def running() -> Running | None:
    """What runs now; None where no config does.

    MONAI hands a component only what its own item says: the parser, and who made the workflow, are some frames above.
    """
    found = None
    workflow = None
    for frame, _ in walk_stack(None):
        own = frame.f_locals.get("self")
        if found is None and isinstance(own, ConfigParser):
            found = Running(own)
        elif found and workflow is None and isinstance(own, ConfigWorkflow):
            workflow = own
            found.names = frozenset((own.init_id, own.run_id, own.final_id))
            found.root = own.config_root_path
        elif frame.f_code is create_workflow.__code__ and frame.f_locals.get("workflow_") is workflow is not None:
            taken = frame.f_locals["_args"]
            files = frame.f_locals["config_file"]
            files = files.split(",") if isinstance(files, str) and not Path(files).is_file() else files
            found.files = (files,) if isinstance(files, str) else tuple(files or ())
            found.given = {key: value for key, value in taken.items() if key not in ARGUMENTS}
            found.asked = {k: v for k, v in frame.f_locals["kwargs"].items() if k not in ARGUMENTS}
        elif found and found.files is not None and frame.f_globals.get("__name__") == "fire.core":
            found.spoken = spoken(sys.argv[1:])
    return found


def spoken(arguments: Sequence[str]) -> dict[str, str]:
    """``--key value`` and ``--key=value`` of a command line, values as written: fire reads Python in them.

    It would cut ``scan#1`` at its ``#``, make a pair of ``a,b``, and a number of ``2024``.
    """
    found = {}
    for word, following in zip(arguments, [*arguments[1:], "--"], strict=True):
        if FLAG.match(word):
            key, equals, value = word.lstrip("-").partition("=")
            if equals or not FLAG.match(following):
                found[key.replace("-", "_")] = value if equals else following
    return found


# the schema


def is_integer(_: TypeChecker, value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(_: TypeChecker, value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def ascending(_: Draft202012Validator, how: str, value: object, __: Mapping) -> Iterator[ValidationError]:
    """The keyword ``ascending``: ``strictly``, or ``or equal``."""
    if isinstance(value, list) and all(is_number(None, item) for item in value):
        if any(b < a or (a == b and how == "strictly") for a, b in zip(value, value[1:], strict=False)):
            yield ValidationError("is not ascending")


KeyValidator = validators.extend(
    Draft202012Validator,
    {"ascending": ascending},
    type_checker=Draft202012Validator.TYPE_CHECKER.redefine_many({"integer": is_integer, "number": is_number}),
)


def types(spec: Mapping[str, Any]) -> list[str]:
    """The types that a key may have."""
    return [spec["type"]] if isinstance(spec["type"], str) else spec["type"]


def is_text(spec: Mapping[str, Any]) -> bool:
    """Whether a key holds a path or a text, which is data and never code."""
    return "string" in types(spec) and spec.get("format") != "device"


def wanted(spec: Mapping[str, Any]) -> str:
    """What a key may be, in words."""
    if "enum" in spec:
        return " or ".join(value if isinstance(value, str) else json.dumps(value) for value in spec["enum"])
    return " or ".join(_wanted(kind, spec) for kind in types(spec))


def _wanted(kind: str, spec: Mapping[str, Any]) -> str:
    limits = {"minimum": "of at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    bounds = [f"{word} {spec[key]}" for key, word in limits.items() if key in spec and kind in ("integer", "number")]
    if kind == "array":
        items = spec.get("items", {})
        count = f"{spec['minItems']} " if spec.get("minItems") == spec.get("maxItems", math.nan) else ""
        of = f" of {count}{_plural(wanted(items))}" if items else ""
        multiple = f", multiples of {spec['multipleOfKey']}" if "multipleOfKey" in spec else ""
        return f"a list{of}{multiple}" + (", ascending" if "ascending" in spec else "")
    if kind == "object":
        known = spec.get("properties")
        return "a mapping" + (f" of {', '.join(known)}" if known else "")
    if kind == "string":
        return {"device": "a device of torch, such as cpu", "path": "a path"}.get(spec.get("format"), "a text")
    bounds += [f"{word} {spec[key]}" for key, word in OTHERS.items() if key in spec]
    name = {"integer": "an integer", "number": "a number", "boolean": "true or false", "null": "null"}[kind]
    return " ".join([name, " and ".join(bounds)]).strip()


def _plural(words: str) -> str:
    for one, many in (("an integer", "integers"), ("a number", "numbers"), ("a text", "texts"), ("a list", "lists")):
        words = words.replace(one, many)
    return words


def like(word: str, options: Sequence[str] | set[str]) -> str:
    """``: did you mean ...?``, where an option is close."""
    close = difflib.get_close_matches(word, options, 1)
    return f": did you mean {close[0]}?" if close else ""


def is_component(value: Any) -> bool:
    return ConfigComponent.is_instantiable(value)


def holds_component(value: Any) -> bool:
    if isinstance(value, Mapping):
        return is_component(value) or any(map(holds_component, value.values()))
    return isinstance(value, (list, tuple)) and any(map(holds_component, value))


def texts(value: Any) -> list[str]:
    """All texts in a value."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in texts(item)]
    return [value] if isinstance(value, str) else []


def is_reference(text: str) -> bool:
    """Whether MONAI evaluates a text of a config file."""
    return text.startswith((EXPR_KEY, MACRO_KEY)) or bool(ReferenceResolver.match_refs_pattern(text))


def rewritten(value: Any) -> Any:
    """A value as MONAI leaves it."""
    if isinstance(value, Mapping):
        return {key: rewritten(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rewritten(item) for item in value]
    return ReferenceResolver.normalize_id(value) if isinstance(value, str) else value


def literal(value: Any, references: bool = True) -> Any:
    """A value whose texts MONAI takes as they are: it would make ``::`` of ``#`` in all others.

    Args:
        references: leave texts that MONAI evaluates as they are; False for what nobody wrote into a config.
    """
    if isinstance(value, Mapping):
        return {key: literal(item, references) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [literal(item, references) for item in value]
    if not isinstance(value, str):
        return value
    if is_reference(value):
        if references:
            return value
    elif "#" not in value and ID_SEP_KEY not in value:
        return value
    escaped = "".join(f"\\x{ord(letter):02x}" if letter in "#@:" else letter for letter in ascii(value))
    return EXPR_KEY + escaped


# the check


def check_keys(bundle_root: str | Path, section: str, trained_with: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Hold the config that runs now against its bundle's schema, and set words in it to what they mean.

    ``null``, ``true`` and ``false`` become None, True and False where a key may be so, the word for a device becomes
    the device, and a path or text from the command line is taken letter by letter. Without a running config, or in a
    folder without ``configs/keys.json``, nothing is checked. Returns the values of all keys that are known before
    anything is built.

    Args:
        section: of the schema, named like the config file that the overlays lie on.
        trained_with: key -> value for keys that neither an overlay nor the command line gives.

    Raises:
        InputError: a key, or an argument of a component, is unknown; a value has another type or range than it may
            have; MONAI has dropped a key; a path or text would be run.
    """
    run, folder = running(), configs_folder(bundle_root)
    if run is None or folder is None:
        return {}
    check = _Check(run, folder, section)
    check.take(trained_with or {})
    if problems := check.problems():
        raise InputError("; ".join(dict.fromkeys(problems)))
    return check.known_values


def configs_folder(bundle_root: str | Path) -> Path | None:
    """Where the bundle's configs lie: in ``bundle_root``, or else where the running config's first file does."""
    run = running()
    roots = [Path(bundle_root, "configs")] + ([run.root] if run and run.root else [])
    return next((root for root in roots if (root / SCHEMA).is_file()), None)


class Schema:
    """``configs/keys.json``, as the config ``section`` reads it."""

    def __init__(self, folder: Path, section: str) -> None:
        content = json.loads((folder / SCHEMA).read_text())
        self.sections = {name: keys for name, keys in content.items() if name not in SECTIONS}
        if section not in self.sections:
            raise InputError(
                f"start#keys is {section!r}: give one of {', '.join(self.sections)}, the base of the config"
            )
        self.parts: dict[str, str] = content["parts"]
        self.arguments: dict[str, dict] = content["arguments"]
        self.keys: dict[str, dict] = functools.reduce(lambda a, b: b | a, self.sections.values(), {})
        self.keys |= self.sections[section]


class _Check:
    """One run's config against its schema; ``problems`` says what is wrong, and mends what is only worded otherwise."""

    def __init__(self, run: Running, folder: Path, section: str) -> None:
        self.run, self.config, self.section = run, run.parser.config, section
        self.schema = Schema(folder, section)
        base = folder / f"{section}.json"
        self.base = json.loads(base.read_text()) if base.is_file() else {}
        self.files = {file: ConfigParser.load_config_file(file) for file in run.files or ()}
        self.merged = ConfigParser.load_config_files(list(self.files)) if self.files else {}
        self.known_values: dict[str, Any] = {}
        self.known = {*self.schema.keys, *self.schema.parts, *RESERVED, *run.names}

    def problems(self) -> list[str]:
        found = [*self.dropped(), *self.unknown(), *self.unused(), *self.outdated(), *self.code()]
        changed = self.reword()
        found += [*self.groups(), *self.components(), *self.values(literals=True)]
        if not found:
            if changed:
                self.run.parser.parse(reset=True)
            found += self.values(literals=False)
        return found

    def take(self, told: Mapping[str, Any]) -> None:
        """Set keys that nobody gives."""
        if self.files:
            overlays = [content for file, content in self.files.items() if Path(file).stem != self.section]
            given = {top(unmerged(key)) for keys in (self.run.given, *overlays) for key in keys}
        else:  # nobody knows what was given
            given = {key for key in self.config if self.config[key] != self.base.get(key)}
        told = {key: told[key] for key in self.schema.keys if key in told and key not in given}
        if components := [key for key, value in told.items() if holds_component(value)]:
            raise InputError(
                f"the checkpoint says {components[0]} is {shown(told[components[0]])}, which a run would build; no "
                "training writes it; take the weights from where you trust them"
            )
        taken = {key: literal(value, references=False) for key, value in told.items()}
        taken = {key: value for key, value in taken.items() if key in self.config and value != self.config[key]}
        if taken:
            self.config |= taken
            self.run.parser.parse(reset=True)

    # names

    def dropped(self) -> Iterator[str]:
        """Keys that MONAI does not take as they were given."""
        for key, value in self.run.asked.items():
            if key.startswith(MERGE_KEY):
                name = key.removeprefix(MERGE_KEY)
                yield f"{key} replaces {name} outside of config files: give {name}#..., or {key} in a file"
            if value is not None or key in self.run.given:
                continue
            spec = self.schema.keys.get(key)
            if spec is None:
                yield f"--{key} is no key of this bundle{like(key, self.known)}"
            elif "null" in types(spec):
                yield f"{key} None does nothing, since MONAI drops it: write --{key} null"
            else:
                yield f"{key} None does nothing, since MONAI drops it: give {wanted(spec)}"

    def unknown(self) -> Iterator[str]:
        for key in self.config:
            if key in self.known or key.startswith(OWN) or top(key) in map(top, self.run.given):
                continue
            source = next((file for file, content in self.files.items() if key in map(top, content)), "the config")
            yield f"{source} has the key {key}, which is none of this bundle's{like(key, self.known)} {WHERE}"

    def unused(self) -> Iterator[str]:
        """Keys given that no file has: the run would not look at them."""
        for key in dict.fromkeys(map(top, self.run.given)):
            if key in self.merged or key in RESERVED or key in self.run.names or key.startswith(OWN):
                continue
            files = ", ".join(Path(file).name for file in self.files)
            if key in self.known:
                yield f"--{key} changes nothing here, since {files} has no such key: add the config file that has it"
            else:
                close = like(key, {*self.merged, *ARGUMENTS})
                yield f"--{key} is no key of {files}{close} {WHERE}"

    def outdated(self) -> Iterator[str]:
        """Keys that an overlay gives for its own value of another key, where that one alone is given anew."""
        given = [(file, content) for file, content in self.files.items() if Path(file).stem != self.section]
        given.append(("the command line", self.run.given))
        last = {top(unmerged(key)): source for source, content in given for key in content}
        for key, others in ((key, spec.get(DECIDES, ())) for key, spec in self.schema.keys.items()):
            values = {source: content[key] for source, content in given if key in content}
            for source, value in values.items():
                left = [other for other in others if last.get(other) == source]
                if left and values[last[key]] != value:
                    yield (
                        f"{key} is {shown(values[last[key]])} by {last[key]}, and {', '.join(left)} still of {source}, "
                        f"for {key} {shown(value)}: give {' and '.join(left)} too, or leave {Path(source).name} out"
                    )

    def groups(self) -> Iterator[str]:
        """Unknown keys in the groups of the base, such as ``train``."""
        for group in self.schema.parts:
            own, base = self.config.get(group), self.base.get(group)
            if not isinstance(own, Mapping) or not isinstance(base, Mapping) or is_component(own) or is_component(base):
                continue
            for key in own:
                if key not in base and f"{group}#{key}" not in self.schema.parts and not key.startswith(OWN):
                    yield f"{group}#{key} is no key of this bundle{like(key, set(base))} {WHERE}"

    def components(self) -> Iterator[str]:
        """Arguments that a component does not take; those as in the base are tested once for all."""
        yield from self._components(self.config, self.base, "")

    def _components(self, own: Any, base: Any, path: str) -> Iterator[str]:
        if own is base or path == ConfigParser.meta_key:
            return
        if is_component(own):
            same = is_component(base) and own["_target_"] == base["_target_"] and own.keys() <= base.keys()
            yield from () if same else self._arguments(own, path)
            for name, spec in self.schema.arguments.items():
                if name in own and not any(map(is_reference, texts(own[name]))):
                    yield from self._errors(f"{path}#{name}", spec, own[name])
        if isinstance(own, Mapping):
            beside = base if isinstance(base, Mapping) else {}
            children = [(key, value, beside.get(key)) for key, value in own.items()]
        elif isinstance(own, list):
            beside = base[: len(own)] if isinstance(base, list) else []
            children = [*zip(range(len(own)), own, [*beside, *[None] * (len(own) - len(beside))], strict=True)]
        else:
            children = []
        for key, value, other in children:
            yield from self._components(value, other, f"{path}#{key}" if path else f"{key}")

    def _arguments(self, component: Mapping[str, Any], path: str) -> Iterator[str]:
        target = component["_target_"]
        if not isinstance(target, str) or target.startswith(EXPR_KEY):
            return
        found = locate(ConfigComponent(component, locator=self.run.parser.locator).resolve_module_name())
        if found is None:
            yield f"{path} has the _target_ {target}, and there is no such component: correct its name"
            return
        try:
            parameters = inspect.signature(found).parameters
        except (TypeError, ValueError):  # of some in C
            return
        if any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values()):
            return
        for name in component:
            if name not in parameters and name not in ConfigComponent.non_arg_keys:
                yield f"{path}#{name} is no argument of {target}{like(name, set(parameters))}"

    # texts

    def code(self) -> Iterator[str]:
        """Paths and texts, given beside the files, that MONAI would run."""
        for key, value in self.run.given.items():
            spec = self.schema.keys.get(key)
            if spec is None or not is_text(spec) or holds_component(value):
                continue
            asked = self.run.spoken.get(key, value)
            unsafe = [text for text in {*texts(value), *texts(asked)} if text.startswith(UNSAFE) and text != "$None"]
            for text in unsafe:
                yield (
                    f"{key} {text!r} begins with {text[0]}, which MONAI takes for code: begin a path with ./, put a "
                    "text in a file, or an expression in a config file of your own"
                )
        for key, spec in self.schema.keys.items():
            # MONAI has written into lists, and of a workflow without create_workflow nobody knows what was given
            lost = self.run.files is None or (
                not isinstance(self.run.given.get(key, ""), str) and key not in self.run.spoken
            )
            if lost and key in self.config and is_text(spec) and not holds_component(self.config[key]):
                if any(ID_SEP_KEY in text and not is_reference(text) for text in texts(self.config[key])):
                    yield f"{key} holds # or ::, of which MONAI makes the other here: give it in a config file"

    def reword(self) -> bool:
        """Texts as written, and words as what they mean, in the config; whether any changed."""
        changed = False
        for key, spec in self.schema.keys.items():
            if key not in self.config or holds_component(self.config[key]):
                continue
            before = self.config[key]
            value = self._written(key, spec, before) if is_text(spec) else before
            if isinstance(value, str):
                kinds = types(spec)
                word = value.lower() if value.lower() in WORDS else None
                if word == "null" and "null" in kinds or word in ("true", "false") and "boolean" in kinds:
                    value = WORDS[word]
                elif spec.get("format") == "device" and not is_reference(value):
                    try:
                        value = f"$torch.device({str(torch.device(value))!r})"
                    except RuntimeError:
                        pass  # told with the other values
            if value is not before and value != before:
                self.config[key] = value
                changed = True
        return changed

    def _written(self, key: str, spec: Mapping[str, Any], found: Any) -> Any:
        """A path or text as a person wrote it: fire, and MONAI, change some."""
        if key not in self.run.given:
            value = self.merged.get(key)
            return literal(value if rewritten(value) == found else found)
        value, asked = self.run.given[key], self.run.spoken.get(key)
        if asked is not None:
            parts = {"array", "object"} & set(types(spec)) and asked.startswith(("[", "(", "{"))
            value = DefaultParseValue(asked) if parts else asked  # MONAI has written into the list that fire made
        return literal(value)

    # values

    def values(self, literals: bool) -> list[str]:
        """What is wrong with the values of the keys: those that are written, or those that follow from expressions."""
        problems = []
        values = self.known_values
        parser = ConfigParser(dict(self.config))
        for key, spec in self.schema.keys.items():
            if key not in self.config or holds_component(self.config[key]):
                continue
            written = not any(map(is_reference, texts(self.config[key])))
            if written:
                values[key] = plain(self.config[key])
            elif literals or not self._follows(key):
                continue
            else:
                try:
                    values[key] = plain(parser.get_parsed_content(key))
                except Exception as error:  # of any kind: it is a person's code
                    cause = error.__cause__ or error
                    problems.append(f"{key} {self.config[key]!r} cannot be evaluated ({type(cause).__name__}: {cause})")
                    continue
            if written == literals:
                problems += self._errors(key, spec, values[key])
        return problems or [told for key in values for told in self._beside(key, values)]

    def _beside(self, key: str, values: Mapping[str, Any]) -> Iterator[str]:
        """What is wrong with a value beside that of another key."""
        spec, value = self.schema.keys[key], values[key]
        limit, divisor = values.get(spec.get("atMostKey")), values.get(spec.get("multipleOfKey"))
        if is_number(None, value) and is_number(None, limit) and value > limit:
            name = spec["atMostKey"]
            yield f"{key} is {value}, above {name}, {limit}: lower it, or raise {name}"
        if value is not None and divisor is not None and np.any(np.mod(value, divisor)):
            yield f"{key} is {value}, no multiple of {spec['multipleOfKey']}, {divisor}: change one of them"

    def _follows(self, key: str, above: tuple[str, ...] = ()) -> bool:
        """Whether a key follows from other keys alone, so that it is known before anything is built."""
        if key in above or key not in self.schema.keys or key not in self.config or holds_component(self.config[key]):
            return False
        referred = {top(id) for id in ReferenceResolver.find_refs_in_config(self.config[key], key)} - {key}
        return all(self._follows(other, (*above, key)) for other in referred)

    def _errors(self, key: str, spec: Mapping[str, Any], value: Any) -> Iterator[str]:
        for error in KeyValidator(spec).iter_errors(plain(value)):
            place = "#".join([key, *map(str, error.absolute_path)])
            if error.validator == "additionalProperties":
                known = error.schema["properties"]
                for name in error.instance.keys() - known:
                    close = like(name, set(known)) or f": it has {', '.join(known)}"
                    yield f"{place} has no {name}{close}"
                continue
            yield f"{place} is {shown(error.instance)}: give {wanted(error.schema)}"
        if spec.get("format") == "device" and isinstance(plain(value), str):
            yield from unusable(key, plain(value))


def top(key: str) -> str:
    """The key at the top level of ``dataset_dir#num_train``."""
    return ReferenceResolver.split_id(key)[0]


def unmerged(key: str) -> str:
    """The key without the sign that an overlay adds to what is there."""
    return key.removeprefix(MERGE_KEY)


def shown(value: Any) -> str:
    """A value, cut where it is long."""
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def unusable(key: str, word: str) -> Iterator[str]:
    """Why torch has no such device here."""
    try:
        torch.empty(0, device=torch.device(word))
    except Exception as error:  # RuntimeError, AssertionError, ...: each kind of device has its own
        cause = str(error).strip().splitlines()[0].rstrip(".")
        yield f"{key} {word} cannot be used here ({cause}): give cpu, or a device that this machine has"


# the reference


def reference(bundle: Path) -> str:
    """``docs/keys.md``: every key of a bundle with its default, what it may be, and what it is for."""
    configs = {path.stem: json.loads(path.read_text()) for path in sorted((bundle / "configs").glob("*.json"))}
    names = Schema(bundle / "configs", next(iter(json.loads((bundle / "configs" / SCHEMA).read_text())))).sections
    lines = [
        f"# Keys of the {bundle.name} bundle",
        "",
        "Made from `configs/keys.json` and the configs by",
        "```",
        f"python -m custom_components.run.keys bundles/{bundle.name}",
        "```",
        "Give a key as `--key value`, or in an overlay of your own. Unknown keys are an error; names of your own begin "
        f"with `{OWN}`.",
        "On the command line, `null`, `true` and `false` are values. Paths and texts are taken literally; those that "
        "begin with `$`, `@` or `%` are refused: begin a path with `./`, and put expressions into config files.",
        "",
    ]
    for name in names:
        schema = Schema(bundle / "configs", name)
        base = configs[name]
        own = [key for key in base if key in schema.keys]
        lines += [f"## {name}.json", "", "| key | default | allowed values | meaning |", "|---|---|---|---|"]
        lines += [_row(key, schema.keys[key], base[key]) for key in own]
        extra = {
            key: overlay
            for key in schema.sections[name]
            if key not in base
            for overlay, content in configs.items()
            if key in content
        }
        if extra:
            lines += ["", "Keys of its overlays:", "", "| key | default in overlay | allowed values | meaning |"]
            lines += ["|---|---|---|---|"]
            lines += [
                _row(key, schema.keys[key], configs[stem][key], f"`{stem}.json`: ") for key, stem in extra.items()
            ]
        lines.append("")
    lines += ["## Arguments of components", "", "Given as `--dataset_dir#num_train 64`.", ""]
    lines += ["| argument | allowed values | meaning |", "|---|---|---|"]
    lines += [f"| `{key}` | {wanted(spec)} | {spec['description']} |" for key, spec in schema.arguments.items()]
    lines += [
        "",
        "## Parts",
        "",
        "Components of the configs; an overlay may replace one.",
        "",
        "| id | meaning |",
        "|---|---|",
    ]
    lines += [f"| `{key}` | {words} |" for key, words in schema.parts.items()]
    monai = ", ".join(f"`{key}`" for key in sorted(ARGUMENTS | TRACKING))
    lines += ["", f"Arguments of MONAI and of its tracking, documented by MONAI: {monai}."]
    return "\n".join(lines) + "\n"


def _row(key: str, spec: Mapping[str, Any], default: Any, where: str = "") -> str:
    text = json.dumps(default) if not isinstance(default, str) else default or '""'
    if told := OF_WEIGHTS.fullmatch(text):
        where += "from the weights, else "
        text = json.dumps(ast.literal_eval(told[1]))
    text = f"`{text}`" if len(text) <= 60 else "see the file"
    return f"| `{key}` | {where}{text} | {wanted(spec)} | {spec['description']} |".replace("||", "|")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m custom_components.run.keys", description=reference.__doc__)
    parser.add_argument("bundles", nargs="+", type=Path, help="folders of bundles")
    for bundle in parser.parse_args().bundles:
        with replacing(bundle / "docs" / "keys.md") as temporary:
            temporary.write_text(reference(bundle))


if __name__ == "__main__":
    main()
