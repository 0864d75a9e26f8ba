"""Files for test_pickles.py: writers of every published layout, and a corpus of damaged, hostile and absurd ones.

As a program, `python pickle_corpus.py FOLDER`, it reads the whole corpus under limits of memory and processor time,
with an audit hook in place, and prints one line of JSON per file: name, outcome, message. It writes only into FOLDER.
"""

import io
import json
import pickle
import random
import re
import resource
import signal
import struct
import sys
import zipfile
from argparse import Namespace
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden"
MAGIC = 0x1950A86A20F9469CFC6C
GIGABYTE = 1 << 30


@dataclass(frozen=True)
class Case:
    "A file; whether it may be read; what the message must contain if it is refused."

    name: str
    data: bytes
    readable: bool = False
    because: str = ""


# ---- writers of published layouts: stand-ins with the right names exist only while something is written


@contextmanager
def standing_in(**classes):
    "Modules that hold the given classes or functions under their own `__module__`."
    made = {}
    for thing in classes.values():
        parts = thing.__module__.split(".")
        for i in range(len(parts)):
            name = ".".join(parts[: i + 1])
            made[name] = made.get(name) or sys.modules.get(name) or ModuleType(name)
        setattr(made[thing.__module__], thing.__name__, thing)
    added = {name: module for name, module in made.items() if name not in sys.modules}
    sys.modules.update(added)
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]


def _reconstruct_persistent_obj(meta):
    raise AssertionError("the source text in a file would run now")


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


class EasyDict(dict):
    pass


EasyDict.__module__ = "dnnlib.util"


class Network:
    pass


Network.__module__ = "dnnlib.tflib.network"


class Persistent:
    "Pickles like a module of the ADA release."

    def __init__(self, class_name, parameters, buffers, modules, **attributes):
        state = {
            "training": False,
            "_parameters": OrderedDict(parameters),
            "_buffers": OrderedDict(buffers),
            "_non_persistent_buffers_set": set(),
            "_backward_hooks": OrderedDict(),
            "_modules": OrderedDict(modules),
            **attributes,
        }
        self.meta = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": class_name, "state": state}

    def __reduce__(self):
        return _reconstruct_persistent_obj, (self.meta,)


SOURCE = "raise SystemExit('source text of a file was executed')"
BUFFERS = ("resample_filter", "noise_const", "w_avg")


def persistent(tensors, class_name="Generator", **attributes):
    "A tree of persistent modules for dotted names."
    own = {name: tensor for name, tensor in tensors.items() if "." not in name}
    parts = dict.fromkeys(name.split(".")[0] for name in tensors if "." in name)
    inside = {part: {n[len(part) + 1 :]: t for n, t in tensors.items() if n.startswith(part + ".")} for part in parts}
    parameters = {n: torch.nn.Parameter(t, requires_grad=False) for n, t in own.items() if n not in BUFFERS}
    buffers = {n: t for n, t in own.items() if n in BUFFERS}
    return Persistent(class_name, parameters, buffers, {p: persistent(t, p) for p, t in inside.items()}, **attributes)


def ada_pickle(tensors, kwargs, protocol=4, numpy_1=False, **attributes):
    "A snapshot of the ADA release."
    attributes = {"act_gain": np.sqrt(np.float64(2)), "_init_args": (), "_init_kwargs": EasyDict(kwargs), **attributes}
    network = persistent(tensors, **attributes)
    snapshot = {
        "training_set_kwargs": {"use_labels": False},
        "G": network,
        "D": None,
        "G_ema": network,
        "augment_pipe": None,
    }
    with standing_in(a=_reconstruct_persistent_obj, b=EasyDict):
        return old_numpy(pickle.dumps(snapshot, protocol), numpy_1)


def old_numpy(data, wanted=True):
    "`data` (protocol 2 or 3) with numpy's modules called as numpy 1 called them."
    assert not wanted or data[1] < 4 and b"cnumpy._core." in data
    return data.replace(b"cnumpy._core.", b"cnumpy.core.") if wanted else data


def tf_network(variables, static=None, components=None, version=4):
    "A TensorFlow network of `(name, value)` pairs."
    network = Network()
    vars(network).update(
        version=version,
        name="Gs",
        static_kwargs=EasyDict(static or {}),
        components=EasyDict(components or {}),
        build_module_src=SOURCE,
        build_func_name="G_main",
        variables=list(variables),
    )
    return network


def tf_pickle(variables, static, protocol=4, numpy_1=False, version=4):
    "Three networks as in the TensorFlow release; `variables` under full names."
    inside = lambda part: [(n[len(part) + 1 :], v) for n, v in variables.items() if n.startswith(part + "/")]
    components = {part: tf_network(inside(part)) for part in ("mapping", "synthesis")}
    network = tf_network([(n, v) for n, v in variables.items() if "/" not in n], static, components, version)
    with standing_in(a=Network, b=EasyDict):
        return old_numpy(pickle.dumps((network, tf_network([]), network), protocol), numpy_1)


def torch_file(value, new=True):
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=new)
    return buffer.getvalue()


class NonlinearWalk(torch.nn.Module):
    "The class of COP-Gen's file, which lived in its main script."

    def __init__(self, width):
        super().__init__()
        self.walker = torch.nn.Sequential(
            torch.nn.Linear(width, width), torch.nn.ReLU(inplace=True), torch.nn.Linear(width, width)
        )


class NonlinearWalker(NonlinearWalk):
    "The class of the paper's files."


NonlinearWalker.__module__ = "src.noise_maker.walkers"


class _Places(pickle._Pickler):
    "Writes a zip-format pickle whose storages claim to lie on the first GPU."

    def __init__(self, file, storages):
        super().__init__(file, 2)
        self.storages = storages

    def persistent_id(self, thing):
        if not isinstance(thing, torch.storage.TypedStorage):
            return None
        key = str(len(self.storages))
        self.storages[key] = bytes(thing._untyped_storage)
        return "storage", torch.FloatStorage, key, "cuda:0", thing.size()


def navigator_file(state):
    "A file laid out as COP-Gen's: DataParallel around a class of `__main__`, every storage on a GPU, protocol 2."
    walker = NonlinearWalk(len(state["walker.0.bias"]))
    walker.load_state_dict(state)
    parallel = torch.nn.DataParallel(walker)
    vars(parallel).update(dim=0, device_ids=[0, 1, 2, 3], output_device=0, src_device_obj=torch.device("cuda", 0))
    storages, file = {}, io.BytesIO()
    NonlinearWalk.__module__ = "__main__"
    main, before = sys.modules["__main__"], vars(sys.modules["__main__"]).get("NonlinearWalk")
    main.NonlinearWalk = NonlinearWalk
    try:
        _Places(file, storages).dump({"nn_walker": parallel})
    finally:
        NonlinearWalk.__module__ = __name__
        if before is None:
            del main.NonlinearWalk
    members = {"data.pkl": file.getvalue(), **{f"data/{key}": raw for key, raw in storages.items()}, "version": b"3\n"}
    return zip_file(members)


def zip_file(members, root="archive/", method=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(root + name, data)
    return buffer.getvalue()


# ---- the smallest honest file of each layout

SMALL = {"z_dim": 2, "c_dim": 0, "w_dim": 2, "img_resolution": 4, "img_channels": 1}
PARTS = {"mapping_kwargs": {"num_layers": 1}, "synthesis_kwargs": {"channel_base": 8, "channel_max": 2}}
SMALL_SHAPES = {
    "mapping.fc0.weight": (2, 2),
    "mapping.fc0.bias": (2,),
    "mapping.w_avg": (2,),
    "synthesis.b4.resample_filter": (4, 4),
    "synthesis.b4.const": (2, 4, 4),
    "synthesis.b4.conv1.weight": (2, 2, 3, 3),
    "synthesis.b4.conv1.bias": (2,),
    "synthesis.b4.conv1.affine.weight": (2, 2),
    "synthesis.b4.conv1.affine.bias": (2,),
    "synthesis.b4.conv1.resample_filter": (4, 4),
    "synthesis.b4.conv1.noise_const": (4, 4),
    "synthesis.b4.conv1.noise_strength": (),
    "synthesis.b4.torgb.weight": (1, 2, 1, 1),
    "synthesis.b4.torgb.bias": (1,),
    "synthesis.b4.torgb.affine.weight": (2, 2),
    "synthesis.b4.torgb.affine.bias": (2,),
}
SMALL_TF = {
    "dlatent_avg": (2,),
    "lod": (),
    "mapping/Dense0/weight": (2, 2),
    "mapping/Dense0/bias": (2,),
    "synthesis/noise0": (1, 1, 4, 4),
    "synthesis/4x4/Const/const": (1, 2, 4, 4),
    "synthesis/4x4/Conv/weight": (3, 3, 2, 2),
    "synthesis/4x4/Conv/bias": (2,),
    "synthesis/4x4/Conv/mod_weight": (2, 2),
    "synthesis/4x4/Conv/mod_bias": (2,),
    "synthesis/4x4/Conv/noise_strength": (),
    "synthesis/4x4/ToRGB/weight": (1, 1, 2, 1),
    "synthesis/4x4/ToRGB/bias": (1,),
    "synthesis/4x4/ToRGB/mod_weight": (2, 2),
    "synthesis/4x4/ToRGB/mod_bias": (2,),
}
SMALL_STATIC = {
    "latent_size": 2,
    "dlatent_size": 2,
    "resolution": 4,
    "num_channels": 1,
    "mapping_layers": 1,
    "fmap_base": 4,
    "fmap_max": 2,
}
SMALL_BIGBIGAN = {
    "shared.weight": (2, 3),
    "linear.weight": (64, 2),
    "blocks.0.0.conv1.weight": (2, 4, 3, 3),
    "blocks.0.0.bn1.gain.weight": (4, 5),
    "output_layer.0.gain": (2,),
    "output_layer.2.weight": (3, 2, 3, 3),
}
SMALL_ARGS = {
    "num_channels_dec": 2,
    "num_preprocess_blocks": 1,
    "num_latent_scales": 1,
    "num_groups_per_scale": 2,
    "num_latent_per_group": 1,
}


def draws(shapes, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}


def numpy_values(tensors):
    "0-d tensors as numpy scalars, the rest as arrays."
    return {name: t.numpy() if t.dim() else np.float32(t.item()) for name, t in tensors.items()}


def nvae_checkpoint():
    state = draws({"prior_ftr0": (4, 2, 2), "dec_sampler.0.1.weight": (2, 4, 1, 1)})
    return {"epoch": 3, "state_dict": state, "args": Namespace(**SMALL_ARGS), "arch_instance": {"up": ["a"]}}


def bases():
    "One small honest file of each layout."
    ada = {f"ada{p}": ada_pickle(draws(SMALL_SHAPES), SMALL | PARTS, p) for p in (2, 3, 4, 5)}
    tf = {f"tf{p}": tf_pickle(numpy_values(draws(SMALL_TF)), SMALL_STATIC, p) for p in (2, 4, 5)}
    with standing_in(a=NonlinearWalker):
        walker = torch_file({"nn_walker": NonlinearWalker(2)})
    return {
        **ada,
        **tf,
        "bigbigan-new": torch_file(draws(SMALL_BIGBIGAN)),
        "bigbigan-old": torch_file(draws(SMALL_BIGBIGAN), False),
        "nvae-new": torch_file(nvae_checkpoint()),
        "nvae-old": torch_file(nvae_checkpoint(), False),
        "walker": walker,
    }


# ---- an assembler for pickles that no honest program writes

PROTO = b"\x80\x04"


def text(value):
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def blob(raw):
    return b"B" + struct.pack("<I", len(raw)) + raw


def number(value):
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def tuple_(*parts):
    return b"(" + b"".join(parts) + b"t"


def dict_(**parts):
    return b"}(" + b"".join(text(key) + part for key, part in parts.items()) + b"u"


def global_(path):
    module, _, name = path.rpartition(".")
    return text(module) + text(name) + b"\x93"


def call(path, *arguments):
    return global_(path) + tuple_(*arguments) + b"R"


def storage_blob(kind="Float", count=4, raw=bytes(16), key="0", claim=None, keys=("0",), facts=None, body=None):
    "One storage in torch's old layout."
    pid = (
        tuple_(text("storage"), b"ctorch\n" + kind.encode() + b"Storage\n", text(key), text("cpu"), number(count), b"N")
        + b"Q"
    )
    facts = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}} if facts is None else facts
    head = b"".join(pickle.dumps(value, 2) for value in (MAGIC, 1001, facts))
    tail = pickle.dumps(list(keys), 2) + struct.pack("<Q", count % (1 << 64) if claim is None else claim) + raw
    return head + b"\x80\x02" + (pid if body is None else body) + b"." + tail


def storage(**choices):
    return call("torch.storage._load_from_bytes", blob(storage_blob(**choices)))


def tensor(size=(2, 2), stride=(2, 1), offset=0, of=None):
    numbers = lambda values: tuple_(*map(number, values)) if all(type(v) is int for v in values) else tuple_(*values)
    arguments = number(offset), numbers(size), numbers(stride), b"\x89", call("collections.OrderedDict")
    return call("torch._utils._rebuild_tensor_v2", storage() if of is None else of, *arguments)


def module(parameters=b"}", modules=b"}", **more):
    "A persistent module with the given programs for its attributes."
    state = dict_(_parameters=parameters, _buffers=b"}", _modules=modules, **more)
    return call("torch_utils.persistence._reconstruct_persistent_obj", dict_(class_name=text("Generator"), state=state))


def snapshot(network):
    return PROTO + dict_(G_ema=network) + b"."


def array(shape=(2,), kind="f4", raw=bytes(8), fortran=b"\x89", order="<", fields=b"NNN"):
    dtype = (
        call("numpy.dtype", text(kind), b"\x89", b"\x88")
        + tuple_(number(3), text(order), fields, number(-1), number(-1), number(0))
        + b"b"
    )
    shapes = tuple_(*map(number, shape))
    empty = call("numpy._core.multiarray._reconstruct", global_("numpy.ndarray"), tuple_(number(0)), blob(b"b"))
    return empty + tuple_(number(1), shapes, dtype, fortran, blob(raw)) + b"b"


def doubled(levels, leaf=b")"):
    "A tuple of tuples with 2 ** levels leaves, on top of some rubble that is popped."
    body = leaf + b"\x94" + b"".join(b"(h%ch%ct\x94" % (i, i) for i in range(levels))
    return b"(" + body + b"1" + b"h" + bytes([levels])


def doubled_modules(levels):
    "A module whose sub-modules double with every level."
    program = module() + b"\x94"
    start = 0
    for _ in range(levels):
        program += b"0" + module(modules=dict_(a=b"h" + bytes([start]), b=b"h" + bytes([start]))) + b"\x94"
        start += 1
    return program


# ---- the corpus


def truncations():
    for name, data in bases().items():
        for end in range(0, len(data), 10 if name in ("ada4", "tf4", "bigbigan-old") else 100):
            yield Case(f"cut/{name}/{end}", data[:end])
    for name in ("stylegan2_32_nosrc_p4", "stylegan2_32_nosrc_p3_emulated_old"):
        data = (GOLDEN / f"{name}.pkl").read_bytes()
        for i in range(12):
            yield Case(f"cut/{name}/{i}", data[: len(data) * i // 12])
        yield Case(f"cut/{name}/last", data[:-1])
        yield Case(f"whole/{name}", data, True)


def flips():
    rng = random.Random(0)
    for name, data in bases().items():
        yield Case(f"whole/{name}", data, True)
        for i in range(60):
            at, bit = rng.randrange(len(data)), rng.randrange(8)
            yield Case(f"flip/{name}/{i}-{at}.{bit}", data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :], True)
        for i in range(15):
            a, b, n = rng.randrange(len(data)), rng.randrange(len(data)), rng.randrange(1, 40)
            yield Case(f"splice/{name}/{i}", data[:a] + data[b : b + n] + data[a + n * (i % 2) :], True)
    data = (GOLDEN / "stylegan2_32_nosrc_p3_emulated_old.pkl").read_bytes()
    for i in range(12):
        at = rng.randrange(len(data))
        yield Case(f"flip/golden/{i}-{at}", data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :], True)


COMMANDS = {
    "os.system": "touch {canary}",
    "posix.system": "touch {canary}",
    "nt.system": "touch {canary}",
    "os.popen": "touch {canary}",
    "subprocess.getoutput": "touch {canary}",
    "subprocess.call": "touch {canary}",
    "commands.getoutput": "touch {canary}",
    "builtins.eval": "open('{canary}', 'w')",
    "builtins.exec": "open('{canary}', 'w')",
    "__builtin__.eval": "open('{canary}', 'w')",
    "timeit.timeit": "open('{canary}', 'w')",
    "cProfile.run": "open('{canary}', 'w')",
    "pdb.run": "open('{canary}', 'w')",
    "builtins.__import__": "this",
    "importlib.import_module": "antigravity",
    "builtins.open": "{canary}",
    "io.open": "{canary}",
    "builtins.compile": "1",
    "builtins.getattr": "x",
    "builtins.globals": "",
    "builtins.breakpoint": "",
    "builtins.input": "",
    "torch.load": "{canary}",
    "torch.hub.load": "{canary}",
    "torch.jit.load": "{canary}",
    "torch.serialization.load": "{canary}",
    "torch.utils.cpp_extension.load": "{canary}",
    "torch.storage._load_from_bytes": "{canary}",
    "torch.ops.load_library": "{canary}",
    "torch.nn.modules.module.os.system": "touch {canary}",
    "torch.nn.modules.linear.Linear": "3",
    "torch.FloatStorage": "9",
    "numpy.load": "{canary}",
    "numpy.fromfile": "{canary}",
    "numpy.frompyfunc": "x",
    "numpy.dtype": "O",
    "numpy.ndarray": "3",
    "numpy._core.multiarray.scalar": "O",
    "numpy._core.multiarray._reconstruct.__globals__": "x",
    "numpy.distutils.exec_command": "x",
    "pickle.loads": "{canary}",
    "_pickle.loads": "{canary}",
    "shelve.open": "{canary}",
    "marshal.loads": "{canary}",
    "runpy.run_path": "{canary}",
    "ctypes.CDLL": "{canary}",
    "webbrowser.open": "https://example.org",
    "shutil.rmtree": "{canary}",
    "os.remove": "{canary}",
    "os.execv": "/bin/true",
    "os._exit": "1",
    "sys.exit": "1",
    "os.abort": "",
    "signal.raise_signal": "9",
    "pty.spawn": "/bin/true",
    "socket.create_connection": "example.org",
    "urllib.request.urlopen": "https://example.org",
    "operator.attrgetter": "system",
    "operator.methodcaller": "system",
    "functools.partial": "x",
    "types.FunctionType": "x",
    "types.CodeType": "x",
    "code.interact": "",
    "copyreg._reconstructor": "x",
    "copyreg.__newobj__": "x",
    "copyreg.add_extension": "x",
    "collections.OrderedDict": "x",
    "collections.defaultdict": "x",
    "dnnlib.util.EasyDict": "x",
    "dnnlib.util.open_url": "{canary}",
    "builtins.set": "x",
    "builtins.bytes": "9",
    "builtins.bytearray": "9",
    "_codecs.encode": "x",
    "_codecs.decode": "x",
    "codecs.open": "{canary}",
    "pathlib.Path.touch": "{canary}",
    "tempfile.mkdtemp": "{canary}",
    "logging.config.listen": "1",
    "torch.device": "\ud800",
    "torch._utils._rebuild_tensor_v2": "x",
    "torch._utils._rebuild_parameter": "x",
    "torch_utils.persistence._reconstruct_persistent_obj": "x",
    "torch_utils.persistence.import_hook": "x",
    "argparse.Namespace": "x",
    "argparse.FileType": "w",
    "__main__.read_all": "x",
    "src.noise_maker.walkers.x": "x",
    "dnnlib.tflib.network.Network": "x",
}
UNDERSTOOD = ("torch.device", "dnnlib.util.open_url")


def hostile(canary):
    "Calls of everything, by every instruction that calls, in every place that is unpickled."
    for path, argument in COMMANDS.items():
        module_, _, name = path.rpartition(".")
        argument = text(argument.format(canary=canary))
        old = b"c" + f"{module_}\n{name}\n".encode()
        ways = {
            "reduce": call(path, argument),
            "old-reduce": old + tuple_(argument) + b"R",
            "newobj": old + tuple_(argument) + b"\x81",
            "newobj-ex": old + tuple_(argument) + b"}\x92",
            "inst": b"(" + argument + b"i" + old[1:],
            "obj": b"(" + old + argument + b"o",
            "build": old + b")\x81" + dict_(__setstate__=call(path, argument)) + b"b",
        }
        because = "" if path in UNDERSTOOD else "asks for|instruction|arguments|damaged or hostile"
        for way, program in ways.items():
            yield Case(f"hostile/{path}/{way}", snapshot(program), because=because)
        reduced = PROTO + dict_(a=ways["reduce"]) + b"."
        yield Case(f"hostile/{path}/zip", zip_file({"data.pkl": reduced}), because=because)
        yield Case(f"hostile/{path}/old", storage_blob(body=ways["old-reduce"]), because=because)
        yield Case(f"hostile/{path}/magic", pickle.dumps(MAGIC, 2) + PROTO + ways["reduce"] + b".", because=because)
        nested = call("torch.storage._load_from_bytes", blob(storage_blob(body=ways["old-reduce"])))
        yield Case(f"hostile/{path}/nested", snapshot(nested), because=because)
        keyed = tuple_(text("storage"), ways["reduce"], text("0"), text("cpu"), number(1), b"N") + b"Q"
        yield Case(f"hostile/{path}/reference", storage_blob(body=keyed), because=because)


REASONS = {  # what a refusal must say, by a part of the name
    "doubled-(key|in-set|set-call)|as-key|colliding|integer-key|float-key|list-key": "as a key",
    "doubled-(config|architecture)|in-config": "too large",
    "doubled-(modules|walker)": r"Limits\(modules",
    "self-containing-modules|parameter-names": "too long",
    "marks|nested-modules": "containers inside each other",
    "instructions": r"Limits\(opcodes",
    "copied-(sets|bytes|arrays)": "copies its own content",
    "long4$": "integer of",
    "long-(global|name)": "asks for xxx",
    "claims|missing|not-utf8|nothing|across": "damaged or hostile",
    "ext[124]|buffer|persid|frozenset": "instruction|outside",
    "trailing": "follow its end",
    "proto-99": "protocol 99",
}


def reason(name):
    return next((reason for part, reason in REASONS.items() if re.search(part, name)), "")


def bombs():
    big = doubled(60)
    yield from (
        Case(f"bomb/{name}", data, because=reason(name))
        for name, data in {
            "doubled-key": PROTO + b"}" + big + b"Ns.",
            "doubled-in-set": PROTO + b"\x8f(" + big + b"\x90.",
            "doubled-set-call": PROTO + call("builtins.set", b"](" + big + b"e") + b".",
            "doubled-config": snapshot(module(_init_kwargs=dict_(z_dim=big))),
            "doubled-attribute": snapshot(module(z_dim=big)),
            "doubled-architecture": snapshot(
                module(
                    _init_kwargs=dict_(
                        **{k: number(v) for k, v in SMALL.items()}, synthesis_kwargs=dict_(architecture=big)
                    )
                )
            ),
            "doubled-version": PROTO
            + tuple_(
                b"N",
                b"N",
                global_("dnnlib.tflib.network.Network") + b")\x81" + dict_(static_kwargs=b"}", version=big) + b"b",
            )
            + b".",
            "doubled-name": PROTO + text("x") + big + b"\x93.",
            "doubled-size": snapshot(tensor(size=[big], stride=[number(1)])),
            "doubled-device": PROTO + call("torch.device", big) + b".",
            "doubled-modules": snapshot(doubled_modules(60)),
            "doubled-walker": zip_file({"data.pkl": PROTO + dict_(nn_walker=doubled_modules(60)) + b"."}),
            "self-containing-list": PROTO + b"]\x94h\x00a.",
            "self-containing-modules": snapshot(
                module(modules=b"}\x94(" + text("a") + module(modules=b"h\x00") + b"u")
            ),
            "nested-lists": PROTO + b"]" * 300_000 + b"a" * 299_999 + b".",
            "nested-lists-in-config": snapshot(module(_init_kwargs=dict_(z_dim=b"]" * 100_000 + b"a" * 99_999))),
            "nested-tuples": PROTO + b")" + b"\x85" * 300_000 + b".",
            "nested-tuple-as-key": PROTO + b"})" + b"\x85" * 300_000 + b"Ns.",
            "nested-dicts": PROTO + b"}" + b"K\x00}" * 100_000 + b"s" * 100_000 + b".",
            "nested-records": PROTO
            + b"".join([global_("argparse.Namespace") + b")\x81}" + text("a")] * 20_000)
            + b"N"
            + b"sb" * 20_000
            + b".",
            "nested-modules": snapshot(b"".join([b""]) + nested_modules(3000)),
            "marks": PROTO + b"(" * 1_000_000 + b"t" * 1_000_000 + b".",
            "instructions": PROTO + b"N0" * 1_500_000 + b"N.",
            "duplicates": PROTO + b"N" + b"2" * 300_000 + b".",
            "sets": PROTO + b"\x8f" * 300_000 + b".",
            "copied-sets": PROTO
            + b"]("
            + b"".join(b"J" + struct.pack("<i", i) for i in range(20_000))
            + b"e\x940"
            + (global_("builtins.set") + b"h\x00\x85R0") * 20_000
            + b"N.",
            "copied-bytes": PROTO
            + text("x" * 1_000_000)
            + b"\x940"
            + (b"c_codecs\nencode\nh\x00" + text("latin1") + b"\x86R") * 20_000
            + b".",
            "copied-arrays": PROTO
            + blob(bytes(1_000_000))
            + b"\x940"
            + (
                call(
                    "numpy._core.numeric._frombuffer",
                    b"h\x00",
                    call("numpy.dtype", text("f4"), b"\x89", b"\x88"),
                    tuple_(number(250_000)),
                    text("C"),
                )
            )
            * 5000
            + b".",
            "copied-storages": PROTO
            + blob(storage_blob(count=250_000, raw=bytes(1_000_000)))
            + b"\x940"
            + (b"ctorch.storage\n_load_from_bytes\nh\x00\x85R") * 5000
            + b".",
            "far-memo": PROTO + b"N" + b"r\xff\xff\xff\xff" + b"j\xff\xff\xff\xff.",
            "far-memo-missing": PROTO + b"j\xff\xff\xff\xff.",
            "long4": PROTO + b"\x8b" + struct.pack("<i", 1_000_000) + b"\x7f" * 1_000_000 + b".",
            "long4-negative": PROTO + b"\x8b" + struct.pack("<i", -5) + b".",
            "long4-absent": PROTO + b"\x8b" + struct.pack("<i", (1 << 31) - 1) + b".",
            "long-text": PROTO + b"L" + b"9" * 1_000_000 + b"L\n.",
            "int-text": PROTO + b"I" + b"9" * 1_000_000 + b"\n.",
            "float-text": PROTO + b"F" + b"9" * 1_000_000 + b"\n.",
            "long-global": PROTO + b"c" + b"x" * 2_000_000 + b"\ny\n.",
            "long-name": PROTO + text("x" * 2_000_000) + text("y") + b"\x93.",
            "long-parameter-names": snapshot(module(parameters=b"}(" + text("x" * 1_000_000) + tensor() + b"u")),
            "huge-integer-key": PROTO + b"}\x8a\xff" + b"\x7f" * 255 + b"Ns.",
            "colliding-keys": PROTO
            + b"}("
            + b"".join(number(i * ((1 << 61) - 1)) + b"N" for i in range(1, 20_000))
            + b"u.",
            "float-key": PROTO + b"}G" + struct.pack(">d", 0.5) + b"Ns.",
            **{
                f"claims/{code}": PROTO + code_byte + struct.pack("<Q", size)[:width] + b"x"
                for code, code_byte, width, size in [
                    ("text-4", b"X", 4, 0xFFFFFFFF),
                    ("text-8", b"\x8d", 8, 1 << 62),
                    ("text-8-more", b"\x8d", 8, (1 << 64) - 1),
                    ("bytes-4", b"B", 4, 0xFFFFFFFF),
                    ("bytes-8", b"\x8e", 8, 1 << 62),
                    ("bytearray-8", b"\x96", 8, 1 << 62),
                    ("text-1", b"\x8c", 1, 255),
                    ("frame", b"\x95", 8, (1 << 64) - 1),
                    ("string-4", b"T", 4, 0x7FFFFFFF),
                    ("string-negative", b"T", 4, 0xFFFFFFFF),
                ]
            },
        }.items()
    )


def nested_modules(levels):
    "Modules inside each other."
    program = module()
    head = (
        text("torch_utils.persistence")
        + text("_reconstruct_persistent_obj")
        + b"\x93(}("
        + text("class_name")
        + text("G")
        + text("state")
    )
    head += b"}(" + text("_modules") + b"}(" + text("a")
    return head * levels + program + b"uuutR" * levels


def odd_instructions():
    yield from (
        Case(f"odd/{name}", PROTO + data, because=reason(name))
        for name, data in {
            "nothing": b"",
            "stop": b".",
            "pop": b"0.",
            "mark-only": b"(.",
            "unknown": b"\xff.",
            "reduce-nothing": b"R.",
            "build-nothing": b"b.",
            "ext1": b"\x82\x01.",
            "ext2": b"\x83\x01\x00.",
            "ext4": b"\x84\x01\x00\x00\x00.",
            "persid": b"Ptext\n.",
            "binpersid": b"NQ.",
            "next-buffer": b"\x97.",
            "readonly-buffer": b"N\x98.",
            "tuple-of-nothing": b"t.",
            "append-to-tuple": b")Na.",
            "append-to-name": global_("argparse.Namespace") + b"Na.",
            "items-to-list": b"]NNs.",
            "odd-items": b"}(Nu.",
            "add-to-list": b"]\x94(N\x90N.",
            "build-list": b"]}b.",
            "build-number": b"K\x01}b.",
            "build-name": global_("argparse.Namespace") + b"}b.",
            "call-number": b"K\x01)R.",
            "call-with-list": global_("collections.OrderedDict") + b"]R.",
            "call-storage": b"ctorch\nFloatStorage\n)R.",
            "record-with-list-state": global_("argparse.Namespace") + b")\x81]b.",
            "name-of-numbers": b"K\x01K\x02\x93.",
            "frozenset": b"(\x91.",
            "list-key": b"}]Ns.",
            "trailing": b"N.N.",
            "trailing-zero": b"N.\0",
            "across-mark": b"N(0t.",
            "surrogates": text("\ud800") + b".",
            "not-utf8": b"X\x01\x00\x00\x00\xff.",
            "proto-99": b"\x80\x63N.",
            "just-none": b"N.",
        }.items()
    )


def geometries():
    yield from (
        Case(f"geometry/{name}", snapshot(module(dict_(w=program))), because=because)
        for name, (program, because) in {
            "leaves": (tensor((4, 2), (2, 1)), "leaves its storage"),
            "offset": (tensor(offset=1), "leaves its storage"),
            "far-offset": (tensor(offset=1 << 40), "leaves its storage"),
            "negative-offset": (tensor(offset=-1), "whole numbers"),
            "stride": (tensor(stride=(3, 1)), "leaves its storage"),
            "negative-stride": (tensor(stride=(-2, 1), offset=2), "whole numbers"),
            "negative-size": (tensor((-2, 2)), "whole numbers"),
            "zero-stride": (tensor((1 << 40,), (0,)), "leaves its storage"),
            "wide-zero-stride": (tensor((5,), (0,)), "leaves its storage"),
            "huge-size": (tensor((1 << 62, 4), (0, 0)), "whole numbers"),
            "huge-number": (tensor((1 << 2000, 1)), "whole numbers"),
            "huge-stride": (tensor((1, 1), (1 << 62, 1)), "whole numbers"),
            "sizes-without-strides": (tensor((2, 2), (1,)), "strides"),
            "many-axes": (tensor((1,) * 64, (1,) * 64), "sizes and"),
            "million-axes": (tensor((1,) * 100_000, (1,) * 100_000), "sizes and"),
            "empty-but-huge": (tensor((0, 1 << 47), (1, 1)), ""),
            "bool-size": (tensor([b"\x88", b"\x88"], (1, 1)), "whole numbers"),
            "float-size": (tensor([b"G" + bytes(8)], (1,)), "whole numbers"),
            "text-size": (tensor([text("2")], (1,)), "whole numbers"),
            "no-storage": (tensor(of=b"N"), "without a storage"),
            "storage-too-short": (tensor(of=storage(raw=bytes(12))), "cut off"),
            "storage-too-long": (tensor(of=storage(raw=bytes(20))), "follow"),
            "storage-huge": (tensor(of=storage(count=1 << 62)), "cut off"),
            "storage-negative": (tensor(of=storage(count=-4)), "no storage"),
            "storage-claim": (tensor(of=storage(claim=1 << 62)), "cut off"),
            "storage-other-key": (tensor(of=storage(keys=("1",))), "does not fit"),
            "storage-no-key": (tensor(of=storage(keys=())), "does not fit"),
            "storage-two-keys": (tensor(of=storage(keys=("0", "0"))), "does not fit"),
            "storage-big-endian": (tensor(of=storage(facts={"little_endian": False})), "little-endian"),
            "storage-no-facts": (tensor(of=storage(facts=[])), "little-endian"),
            "storage-quantised": (tensor(of=storage(kind="QInt8")), "QInt8"),
            "storage-untyped": (tensor(of=storage(kind="Untyped")), "Untyped"),
            "storage-name": (tensor(of=storage(body=b"N")), "does not fit"),
            "storage-is-list": (tensor(of=storage(body=b"]", keys=(), count=0, raw=b"")), "follow"),
            "bytes-are-text": (call("torch.storage._load_from_bytes", text("x")), "not bytes"),
            "array-short": (array(raw=bytes(7)), "in 7 bytes"),
            "array-huge": (array(shape=(1 << 62, 1 << 62)), "in 8 bytes"),
            "array-negative": (array(shape=(-2,)), "array of shape"),
            "array-objects": (array(kind="O"), "plain number"),
            "array-fields": (array(kind="V8"), "plain number"),
            "array-with-fields": (array(fields=b"N(" + text("a") + b"tN"), "fields"),
            "array-order": (array(order="!"), "byte order"),
            "array-axes": (array(shape=(1,) * 40), "shape"),
            "array-text": (array(kind="U2"), "plain number"),
            "nan": (tensor((1,), (1,), of=storage(count=1, raw=struct.pack("<f", float("nan")))), ""),
        }.items()
    )


def lies():
    "Honest pickles, dishonest configurations."
    changes = {
        "img_resolution": [1 << 40, 5, 2, -4, None, "4", 4.0, True, [4]],
        "z_dim": [1 << 70, -1, None, "2", {}],
        "c_dim": [1, -1, 1 << 40],
        "img_channels": [0, 3, 1 << 40],
        "w_dim": [3, 0],
        "mapping_kwargs": [
            {"num_layers": 10**9},
            {"num_layers": 0},
            {"num_layers": 2},
            {"w_avg_beta": None},
            {"num_layers": 1.0},
            [],
            "x",
            None,
        ],
        "synthesis_kwargs": [
            {"channel_base": 0},
            {"channel_base": 10**12},
            {"channel_max": 1},
            {"architecture": "stairs"},
            {"architecture": ["skip"]},
            {"resample_filter": 4},
            {"resample_filter": [1] * 5000},
            {"resample_filter": []},
            {"use_noise": False},
            None,
            7,
        ],
    }
    for key, values in changes.items():
        for i, value in enumerate(values):
            kwargs = SMALL | PARTS | {key: (PARTS[key] | value) if key in PARTS and type(value) is dict else value}
            yield Case(f"lie/{key}/{i}", ada_pickle(draws(SMALL_SHAPES), kwargs))
    for name in SMALL_SHAPES:
        yield Case(
            f"lie/missing/{name}",
            ada_pickle({k: v for k, v in draws(SMALL_SHAPES).items() if k != name}, SMALL | PARTS),
            because=name,
        )
        bent = draws(SMALL_SHAPES) | {name: torch.ones(7)}
        yield Case(f"lie/shape/{name}", ada_pickle(bent, SMALL | PARTS), because=name)
    for key, value in {"num_ws": 3, "z_dim": 9}.items():
        yield Case(
            f"lie/attribute/{key}",
            ada_pickle(draws(SMALL_SHAPES), SMALL | PARTS, **{key: value}),
            key == "num_ws",
            "z_dim",
        )
    for name in SMALL_TF:
        left = {k: v for k, v in numpy_values(draws(SMALL_TF)).items() if k != name}
        yield Case(f"lie/tf-missing/{name}", tf_pickle(left, SMALL_STATIC), name == "lod", "is missing")
    for key, value in {"version": 3, "version ": None}.items():
        yield Case(
            f"lie/tf-{key}", tf_pickle(numpy_values(draws(SMALL_TF)), SMALL_STATIC, version=value), because="version"
        )
    yield Case("lie/tf-argument", tf_pickle({}, SMALL_STATIC | {"blur": 1}), because="blur")
    for key, value in {
        "num_latent_scales": 10**6,
        "num_groups_per_scale": 3,
        "num_latent_per_group": 2,
        "num_channels_dec": None,
    }.items():
        checkpoint = nvae_checkpoint()
        setattr(checkpoint["args"], key, value)
        yield Case(f"lie/nvae/{key}", torch_file(checkpoint))


def archives():
    data = torch_file(draws(SMALL_BIGBIGAN))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    plain = zip_file(members)
    directory, end = data.rindex(b"PK\x01\x02"), plain.rindex(b"PK\x05\x06")
    patch = lambda at, raw: data[:at] + raw + data[at + len(raw) :]
    bomb = zip_file({"data.pkl": b"\x80\x02N." + bytes(50_000_000)}, method=zipfile.ZIP_DEFLATED)
    yield Case("zip/rewritten", plain, True)
    yield Case("zip/parent", zip_file(members, "../"), True)
    for at in (8, 10, 12, 16, 20):  # entries here, entries, size and start of the directory, length of the comment
        yield Case(f"zip/end/{at}", plain[: end + at] + b"\xff\xff\xff\x7f" + plain[end + at + 4 :], True)
    yield from (
        Case(f"zip/{name}", raw, because=because)
        for name, (raw, because) in {
            "bomb": (bomb, "compressed"),
            "compressed": (zip_file(members, method=zipfile.ZIP_DEFLATED), "compressed"),
            "claims-compression": (patch(directory + 10, b"\x08\x00"), ""),
            "encrypted": (patch(directory + 8, b"\x01\x00"), ""),
            "claims-size": (patch(directory + 20, struct.pack("<II", 1 << 31, 1 << 31)), "overlap"),
            "many-entries": (overlapping(data), "overlap"),
            "no-pickle": (zip_file({"version": b"3"}), "no data.pkl"),
            "two-pickles": (zip_file({"archive/data.pkl": b"N.", "b/data.pkl": b"N."}, ""), "no data.pkl"),
            "torchscript": (zip_file(members | {"constants.pkl": b"N."}), "TorchScript"),
            "big-endian": (zip_file(members | {"byteorder": b"big"}), "big-endian"),
            "storage-missing": (zip_file({k: v for k, v in members.items() if k != "data/0"}), "shared.weight"),
            "storage-short": (zip_file(members | {"data/0": b"1234"}), "shared.weight"),
            "empty": (zip_file({}), ""),
            "only-head": (b"PK\x03\x04", ""),
            "storage-long": (zip_file(members | {"data/0": bytes(4000)}), "shared.weight"),
            "pickle-empty": (zip_file(members | {"data.pkl": b""}), ""),
        }.items()
    )
    for at in range(0, len(data), 37):
        yield Case(f"zip/zeroed/{at}", data[:at] + bytes(8) + data[at + 8 :], True)


def overlapping(data):
    "An archive whose directory lists its members a thousand times."
    end = data.rindex(b"PK\x05\x06")
    size, start = struct.unpack("<II", data[end + 12 : end + 20])
    head = data[end : end + 8] + struct.pack("<HHII", 0xFFFE, 0xFFFE, size * 1000, start)
    return data[:start] + data[start : start + size] * 1000 + head + data[end + 20 :]


def foreign():
    safetensors = struct.pack("<Q", 60)
    yield from (
        Case(f"foreign/{name}", data, because=because)
        for name, (data, because) in {
            "empty": (b"", ""),
            "html": (b"<!DOCTYPE html><title>Sign in</title>", "web page"),
            "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
            "gzip": (b"\x1f\x8b\x08\x00" + bytes(40), "gzip"),
            "png": (b"\x89PNG\r\n\x1a\n" + bytes(40), ""),
            "text": (b"weights go here\n" * 9, ""),
            "zeros": (bytes(5000), ""),
            "ones": (b"\xff" * 5000, ""),
            "npy": (b"\x93NUMPY\x01\x00" + bytes(90), ""),
            "elf": (b"\x7fELF" + bytes(90), ""),
            "safetensors-cut": (safetensors + b'{"a":', ""),
            "safetensors-foreign": (safetensors + b"{}".ljust(60), "format"),
            "safetensors-huge": (struct.pack("<Q", 1 << 62) + b"{" * 99, ""),
            "safetensors-deep": (struct.pack("<Q", 99_999) + b"{" + b"[" * 99_998, ""),
            "python": (b"import os; os.system('true')\n", ""),
            "protocol-0": (b"(dp0\nS'a'\nI1\ns.", ""),
            "stop": (b".", ""),
        }.items()
    )


def corpus(canary):
    "Every case; `canary` is a path that some of them try to write."
    for part in (truncations, flips, bombs, odd_instructions, geometries, lies, archives, foreign):
        yield from part()
    yield from hostile(canary)


# ---- the reader under guard

FORBIDDEN = (
    "import",
    "exec",
    "compile",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "os.startfile",
    "subprocess.Popen",
    "pty.spawn",
    "pickle.find_class",
    "ctypes.dlopen",
    "ctypes.dlsym",
    "socket.connect",
    "socket.getaddrinfo",
    "urllib.Request",
    "webbrowser.open",
    "shutil.rmtree",
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.chmod",
    "os.kill",
    "builtins.breakpoint",
    "builtins.input",
    "marshal.loads",
)


class TooSlow(BaseException):
    "Ten seconds of processor time are over; no `except Exception` can swallow it."


class Guard:
    "Notes what no reading of weights may do."

    def __init__(self, path):
        self.path, self.seen, self.on = str(path), [], False
        sys.addaudithook(self.note)

    def note(self, event, arguments):
        other = event == "open" and str(arguments[0]) != self.path
        if self.on and (event in FORBIDDEN or other):
            self.seen.append(f"{event} {str(arguments)[:80]}")


def outcome(read_published, weights_error, path):
    "What reading `path` comes to, as name and message."
    signal.setitimer(signal.ITIMER_PROF, 10)
    try:
        published = read_published(path)
        return "read", {name: list(tensor.shape) for name, tensor in published.tensors.items()}
    except weights_error as error:
        return "refused", str(error)[:400]
    except TooSlow:
        return "too slow", ""
    except BaseException as error:
        return "crashed", f"{type(error).__name__}: {str(error)[:300]}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def limit_memory(more):
    "No more than `more` bytes of address space on top of what the process has now."
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more,) * 2)


def too_slow(*_):
    raise TooSlow


def read_all(folder):
    "Reads the corpus and prints the outcomes; the last line sums up."
    import encodings.cp437  # noqa: F401 - zipfile and pickletools ask for theirs late
    import encodings.raw_unicode_escape  # noqa: F401

    from mlvgm_mi.checkpoints import WeightsError
    from mlvgm_mi.pickles import read_published

    canary, path = folder / "canary", folder / "file"
    signal.signal(signal.SIGPROF, too_slow)
    guard = Guard(path)
    for data in bases().values():  # what is imported late is imported now
        path.write_bytes(data)
        read_published(path)
    cases = list(corpus(canary))
    limit_memory(2 * GIGABYTE)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case in cases:
        path.unlink()  # a file written anew waits for the disk on some file systems
        path.write_bytes(case.data)
        guard.on = True
        verdict, message = outcome(read_published, WeightsError, path)
        guard.on = False
        print(json.dumps([case.name, verdict, message]), flush=True)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    clean, wild = list(guard.seen), folder / "wild"
    guard.on = True
    pickle.loads(
        PROTO + call("posix.system", text(f"touch {wild}")) + b"."
    )  # the guard and the canary must notice this one
    guard.on = False
    print(
        json.dumps(
            {"seen": clean, "control": guard.seen, "wild": wild.exists(), "canary": canary.exists(), "grown": grown}
        )
    )


if __name__ == "__main__":
    read_all(Path(sys.argv[1]))
