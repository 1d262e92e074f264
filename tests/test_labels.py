"""Which class a number, a name or a WordNet id means, and what the classes are called."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from detailflow import DetailFlowError, DetailFlowGPT
from detailflow.labels import ClassId, ClassLabels, default_names, imagenet_classes, listed

CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture(scope="module")
def imagenet() -> ClassLabels:
    return ClassLabels(default_names(1000), 1000)


# ------------------------------------------------------------------------------------------------- the table


def test_the_table_is_imagenets():
    wnids = [wnid for wnid, _ in imagenet_classes()]
    assert len(wnids) == 1000 and wnids == sorted(set(wnids))  # the order of ILSVRC 2012 is that of the ids
    for i, wnid, names in [
        (0, "n01440764", "tench, Tinca tinca"),
        (207, "n02099601", "golden retriever"),
        (281, "n02123045", "tabby, tabby cat"),
        (388, "n02510455", "giant panda, panda, panda bear, coon bear, Ailuropoda melanoleuca"),
        (980, "n09472597", "volcano"),
        (999, "n15075141", "toilet tissue, toilet paper, bathroom tissue"),
    ]:
        assert imagenet_classes()[i] == (wnid, names)
    for _, names in imagenet_classes():
        assert all(name and name.strip(" ,") == name for name in names.split(", "))


def test_a_model_without_names_gets_imagenets_for_1000_classes_only():
    assert default_names(1000) == tuple(names for _, names in imagenet_classes())
    assert default_names(999) is None and default_names(10) is None


def test_labels_do_not_wait_for_torch():
    code = "import sys, detailflow.labels; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# ------------------------------------------------------------------------------------------------- ImageNet


@pytest.mark.parametrize(
    "label",
    [388, "388", " 0388 ", "n02510455", "N02510455", "giant panda", "Panda Bear", "AILUROPODA melanoleuca",
     "giant panda, panda, panda bear, coon bear, Ailuropoda melanoleuca"],
)  # fmt: skip
def test_ways_to_name_a_class(imagenet: ClassLabels, label: int | str):
    assert imagenet.index(label) == 388


def test_every_class_can_be_named(imagenet: ClassLabels):
    unique = 0
    for i, (wnid, names) in enumerate(imagenet_classes()):
        assert imagenet.index(i) == imagenet.index(str(i)) == imagenet.index(wnid) == i
        assert imagenet.name(i) == names.split(", ")[0]
        try:
            assert imagenet.index(names) == i
            unique += 1
        except DetailFlowError as error:  # "crane" is all of the name of two classes
            assert f"classes are called {names!r}" in str(error) and f"{i} ({wnid}: {names})" in str(error)
    assert unique > 990


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("crane", "2 classes are called 'crane': give the number or WordNet id, one of 134 (n02012849: crane), "
         "517 (n03126707: crane)"),
        ("Cardigan", "one of 264 (n02113186: Cardigan, Cardigan Welsh corgi), 474 (n02963159: cardigan)"),
        ("golden retreiver", "unknown class 'golden retreiver': did you mean golden retriever or"),
        ("coon bare", "did you mean coon bear or"),  # not the first of its synonyms
        ("cat", "unknown class 'cat': did you mean tabby cat or tiger cat or Persian cat?"),  # "vat" is closer
        ("n00000000", "unknown class 'n00000000': the classes are tench, goldfish, great white shark, tiger shark, "
         "hammerhead, … (1000 in all)"),
        ("a red poppy at sunset", "(1000 in all); a label is one class; there are no text prompts"),
        ("tench,goldfish", "did you mean "),
        ("tench,goldfish", "? a label is one class; there are no text prompts"),
        ("1000", "unknown class 1000: the numbers are 0 to 999"),
        (-1, "unknown class -1: the numbers are 0 to 999"),
        ("", "unknown class ''"),
        (1.5, "a class label must be a number or a name, not 1.5"),
    ],
)  # fmt: skip
def test_labels_that_mean_no_class(imagenet: ClassLabels, label: int | str, message: str):
    with pytest.raises(DetailFlowError) as caught:
        imagenet.index(label)
    assert message in str(caught.value)


def test_a_misspelt_name_of_two_words_is_taken_for_no_prompt(imagenet: ClassLabels):
    with pytest.raises(DetailFlowError, match=r"did you mean golden retriever.*\?$"):
        imagenet.index("golden retreiver")


def test_a_number_that_int_refuses(imagenet: ClassLabels):
    with pytest.raises(DetailFlowError, match="unknown class '999"):
        imagenet.index("9" * 5000)


def test_search(imagenet: ClassLabels):
    assert imagenet.search("Retriever") == [205, 206, 207, 208, 209]
    assert imagenet.search("crane") == [134, 517]
    assert imagenet.search("melanoleuca") == [388]
    assert imagenet.search("207") == imagenet.search("n02099601") == [207]
    with pytest.raises(DetailFlowError, match="unknown class 'retreiver': did you mean .*golden retriever"):
        imagenet.search("retreiver")


# ------------------------------------------------------------------------------------------------- other names


def test_names_of_ones_own():
    labels = ClassLabels(CIFAR, 10)
    assert [labels.index(label) for label in ("airplane", " TRUCK", "3", 5)] == [0, 9, 3, 5]
    assert labels.name(9) == "truck" and labels.wnids == ()
    assert labels.search("a") == [0, 1, 3]
    with pytest.raises(DetailFlowError, match="unknown class 'n02099601': the classes are airplane, .*, truck$"):
        labels.index("n02099601")


def test_a_comma_in_a_name_of_ones_own():
    labels = ClassLabels(("red, round", "red, square", "red"), 3)
    assert [labels.index(label) for label in ("Red, Square", "red")] == [1, 2]
    assert [labels.name(i) for i in range(3)] == ["red, round", "red, square", "red"]
    with pytest.raises(DetailFlowError, match="unknown class 'round'"):
        labels.index("round")


def test_some_of_imagenets_classes_keep_their_synonyms():
    labels = ClassLabels(("goldfish, Carassius auratus", "tench, Tinca tinca"), 2)
    assert labels.index("tinca TINCA") == 1 and labels.name(0) == "goldfish"
    assert labels.wnids == ()


@pytest.mark.parametrize("names", [("1", "10", "2"), ("001", "010", "002"), ("1", "10", "2", "fish")])
def test_numbers_are_names_where_the_names_are_numbers(names: tuple[str, ...]):
    labels = ClassLabels(names, len(names))
    for value, index in ((1, 0), (10, 1), (2, 2)):
        assert [labels.index(label) for label in (index, str(value), f" {value} ", names[index])] == [index] * 4
    for label in ("0", "3", "-1"):
        message = f"unknown class {label!r}: numbers in text are names here, and the classes are {names[0]}"
        with pytest.raises(DetailFlowError, match=message):
            labels.index(label)
    assert [labels.index(ClassId(i)) for i in range(3)] == [0, 1, 2]
    assert [labels.name(i) for i in range(len(names))] == list(names)


def test_the_whole_name_as_it_is_written_wins():
    labels = ClassLabels(("UPPER", "upper", "7", "07"), 4)
    assert [labels.index(label) for label in ("UPPER", "upper", " upper ", 2, "7", "07")] == [0, 1, 1, 2, 2, 3]
    with pytest.raises(
        DetailFlowError, match=r"2 classes are called 'Upper': give the number, one of 0 \(UPPER\), 1 \(upper\)"
    ):
        labels.index("Upper")


def test_wordnet_ids_as_names():
    """As ImageNet's folders are called."""
    labels = ClassLabels(("n02099601", "N02510455", "my dog"), 3)
    for label in ("golden retriever", "Golden Retriever", "n02099601", "N02099601", 0):
        assert labels.index(label) == 0
    assert labels.index("panda bear") == 1 and labels.index("my dog") == 2
    assert [labels.name(i) for i in range(3)] == ["golden retriever", "giant panda", "my dog"]
    assert labels.wnids == ("n02099601", "n02510455", "")
    assert labels.names[0] == "golden retriever"
    assert labels.search("retriever") == [0]
    assert [labels.find(name) for name in ("golden retriever", "n02510455", "n00000000")] == [0, 1, None]


def test_wordnet_ids_of_two_classes_of_one_name():
    labels = ClassLabels(("n02012849", "n03126707"), 2)
    assert labels.index("n03126707") == 1
    message = r"give the number or WordNet id, one of 0 \(n02012849: crane\), 1 \(n03126707: crane\)"
    with pytest.raises(DetailFlowError, match=message):
        labels.index("crane")


@pytest.mark.parametrize(
    "labels",
    [3, "3", [3], (3,), range(3, 4), np.int64(3), np.array(3), np.array([3]), torch.tensor(3), torch.tensor([3]).byte(),
     [np.uint8(3)], [torch.tensor(3)], np.array(["cat"]), "cat", ["cat"]],
)  # fmt: skip
def test_labels_of_many_types(labels: object):
    own = ClassLabels(CIFAR, 10)
    assert [own.index(label) for label in listed(labels)] == [3]


@pytest.mark.parametrize(
    "labels",
    [True, [False], np.bool_(True), np.array([True]), torch.tensor(True), [torch.tensor([3])], 3.0, np.float32(3),
     torch.tensor([3.0]), b"cat", [b"cat"], None, [None], [[3]]],
)  # fmt: skip
def test_what_is_no_label(labels: object):
    own = ClassLabels(CIFAR, 10)
    with pytest.raises(DetailFlowError, match="a class label must be a number or a name, not "):
        [own.index(label) for label in listed(labels)]


def test_a_tensor_without_numbers():
    with pytest.raises(DetailFlowError, match="^labels must be numbers or names .Cannot copy out of meta tensor"):
        listed(torch.zeros(2, dtype=torch.int64, device="meta"))


@pytest.mark.parametrize("labels", [{"cat", "dog"}, frozenset([3])])
def test_a_set_of_labels_has_no_order(labels: object):
    with pytest.raises(DetailFlowError, match="labels must be a list: a set has no order"):
        listed(labels)


def test_one_name_for_several_classes():
    with pytest.raises(DetailFlowError) as caught:
        ClassLabels(("crane", "dog", "Crane"), 3).index("CRANE")
    assert str(caught.value) == "2 classes are called 'CRANE': give the number, one of 0 (crane), 2 (Crane)"


def test_one_name_for_several_classes_among_numbers():
    labels = ClassLabels(("7", "dup", "dup"), 3)
    with pytest.raises(DetailFlowError) as caught:
        labels.index("dup")
    assert str(caught.value) == (
        "2 classes are called 'dup': give the number, one of 1 (dup), 2 (dup), "
        "as an integer in Python or JSON (numbers in text are names here)"
    )
    assert [labels.index(label) for label in (1, 2, np.int64(0), "7")] == [1, 2, 0, 0]
    with pytest.raises(DetailFlowError, match="unknown class 7: the numbers are 0 to 2"):
        labels.index(7)


def test_accents_of_one_or_two_characters():
    """Folders from macOS often have the second, keyboards give the first; two names that differ in it stay two."""
    one, two = "caf\u00e9", "cafe\u0301"
    assert ClassLabels([two, "tea"], 2).index(one) == ClassLabels([one, "tea"], 2).index(two) == 0
    both = ClassLabels([one, two], 2)
    assert (both.index(one), both.index(two)) == (0, 1)


def test_no_names():
    labels = ClassLabels(None, 1000)
    assert labels.index("207") == 207 and labels.name(207) == "207" and labels.search("207") == [207]
    for ask in (labels.index, labels.search):
        with pytest.raises(DetailFlowError, match="this model's classes have no names, only the numbers 0 to 999"):
            ask("golden retriever")


@pytest.mark.parametrize("class_id", [-1, 10])
def test_the_name_of_no_class(class_id: int):
    with pytest.raises(DetailFlowError, match=f"unknown class {class_id}: the numbers are 0 to 9"):
        ClassLabels(CIFAR, 10).name(class_id)


# ------------------------------------------------------------------------------------------------- in models


def test_a_published_model_of_1000_classes_has_imagenets_names(published: Path, tmp_path: Path):
    gpt = DetailFlowGPT.from_pretrained(published)
    assert gpt.config.class_names == default_names(1000)
    gpt.save_pretrained(tmp_path)  # in our layout, where the names are in the config
    assert json.loads((tmp_path / "config.json").read_text())["class_names"][207] == "golden retriever"
    saved = DetailFlowGPT.from_pretrained(tmp_path).config
    assert ClassLabels(saved.class_names, saved.num_classes).index("n02099601") == 207
