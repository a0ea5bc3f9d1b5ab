"""docs/api is what its generator makes, and the generator leaves nothing public out."""

import ast

from api_pages import PAGES, class_blocks, code, docstring, pages, signature
from house import Function
from reference_pages import DOCS, made

SOURCE: str = '''
@dataclass(frozen=True)
class Scale(Base):
    """What a layer is multiplied by.

    The second paragraph: 2 * 3 < `a * b`.
    """

    factor: float  # above 0
    _hidden: int

    @property
    def doubled(self) -> float:
        """Twice.

        Args:
            x: the input [n],
                over two lines.

        Raises:
            UserError: for nothing.
        """
        return 2 * self.factor

    def _private(self): ...


def long(
    x: int, *, y: str = "a: b"
) -> None:  # fmt: skip
    pass


def short(x: int) -> int: return x
'''
TREE = ast.parse(SOURCE)
LINES: list[str] = list(SOURCE.splitlines())


def test_the_pages_are_what_the_generator_makes() -> None:
    made = pages()
    assert {path.name for path in PAGES.glob("*.md")} == set(made), "run `make docs`"
    assert [name for name, text in made.items() if (PAGES / name).read_text() != text] == [], "run `make docs`"


def test_the_pages_of_commands_losses_and_formats_are_what_their_generator_makes() -> None:
    assert [name for name, text in made().items() if (DOCS / name).read_text(encoding="utf-8") != text] == [], "run `make docs`"


def test_a_class_with_its_fields_methods_and_docstrings() -> None:
    scale = TREE.body[0]
    assert isinstance(scale, ast.ClassDef)
    assert list(class_blocks(scale, LINES)) == [
        code("@dataclass(frozen=True)\nclass Scale(Base):\n    factor: float  # above 0"),
        "What a layer is multiplied by.",
        "The second paragraph: 2 \\* 3 \\< `a * b`.",
        "#### Scale.doubled",
        code("@property\ndef doubled(self) -> float"),
        "Twice.",
        "**Args**\n\n- `x`: the input [n],\n  over two lines.",
        "**Raises**\n\n- `UserError`: for nothing.",
    ]


def test_signatures_stand_as_in_the_source() -> None:
    found = [signature(node, LINES) for node in TREE.body if isinstance(node, Function)]
    assert found == ['def long(\n    x: int, *, y: str = "a: b"\n) -> None', "def short(x: int) -> int"]


def test_an_example_stays_as_it_is() -> None:
    node = ast.parse('"""Say:\n\n    run * fast\n\nor not."""')
    assert list(docstring(node)) == ["Say:", "```text\nrun * fast\n```", "or not."]
