"""What requests and answers look like: OpenAI's images API, and fields of our own."""

from typing import Annotated, Any, Literal

from fastapi import UploadFile
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

Seed = Annotated[int, Field(ge=0, le=2**64 - 1)]
Label = Annotated[str, Field(max_length=1000)] | int
Code = Annotated[int, Field(ge=0, le=2**31 - 1)]
Search = Annotated[int, Field(ge=0, le=20, description="Steps of a search for tokens that show the image better.")]
CODES = TypeAdapter(Annotated[list[Code], Field(min_length=1)], config=ConfigDict(strict=True))


class Body(BaseModel):
    """A JSON body: numbers are numbers, and unknown names are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class Sampling(Body):
    """How tokens are drawn; the model's own best values if left out."""

    guidance_scale: float | None = Field(None, description="Strength of the class; 1 is no guidance.")
    guidance_schedule: str | None = Field(None, description="`constant`, or `linear`: lower from group to group.")
    temperature: float | None = Field(None, description="0 always takes the most likely code.")
    top_k: int | Literal["off"] | None = Field(
        None, description="Draw from the K likeliest codes only; 0 or `off` is all of them."
    )
    top_p: float | Literal["off"] | None = Field(
        None, description="Draw from the likeliest codes that sum to P; 1 or `off` is all of them."
    )


class Request(Sampling):
    """What requests for images have in common."""

    prompt: Label | None
    model: str | None = Field(None, description="The name that `/v1/models` gives.")
    n: int | None = Field(1, ge=1, description="Number of images.")
    seed: Seed | None = Field(None, description="The same seed gives the same images; chosen at random if left out.")
    num_tokens: int | None = Field(None, description="Stop after that many tokens, for coarse images.")
    stream: bool | None = Field(False, description="Answer with server-sent events.")
    partial_images: int | None = Field(
        0, ge=0, le=10_000, description="With `stream`: coarse images to send before each final one."
    )
    response_format: Literal["b64_json"] | None = Field("b64_json", description="Images are in the answer itself.")
    output_format: Literal["png"] | None = "png"
    size: str | None = Field("auto", description="`auto` or the model's own size, such as `256x256`.")
    quality: Literal["auto", "standard", "hd", "low", "medium", "high", "xhigh", "max"] | None = Field(
        None, description="Ignored."
    )
    style: Literal["vivid", "natural"] | None = Field(None, description="Ignored.")
    background: Literal["auto", "opaque"] | None = Field(None, description="Ignored: images are opaque.")
    moderation: Literal["auto", "low"] | None = Field(None, description="Ignored.")
    safety_identifier: str | None = Field(None, description="Ignored.")
    user: str | None = Field(None, description="Ignored.")


class Generation(Request):
    """`POST /v1/images/generations`."""

    prompt: Label | None = Field(
        None,
        description="A class by name, number or WordNet id, as `/v1/classes` lists them; empty or left out for a model "
        "without classes.",
    )


LISTED_IMAGE = "image[]"  # as OpenAI's client calls each image of a list


class ImageForm(BaseModel):
    """A form with an image; everything else in it is text."""

    model_config = ConfigDict(strict=False)

    @model_validator(mode="before")
    @classmethod
    def _take_listed(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Take the only image of a list for the image; `takes_form` refuses more."""
        listed = given.get(LISTED_IMAGE)
        if listed is None:
            return given
        rest = {name: value for name, value in given.items() if name != LISTED_IMAGE}
        return {**rest, "image": listed[0] if isinstance(listed, list) else listed}


class Variation(Request, ImageForm):
    """`POST /v1/images/variations`, a form."""

    image: UploadFile | None = Field(
        None, description="A raster image: PNG, JPEG, WebP, …; its centre square is taken."
    )
    tokens: str | None = Field(
        None, max_length=1_000_000, description="An image's codes in place of it, as a JSON list: `[1, 2, 3]`."
    )
    keep: int | None = Field(None, description="The first tokens that stay; a quarter of them if left out.")
    prompt: Label | None = Field(
        None, description="The class, also another one than the image's; no class if left out."
    )


class Edit(Variation):
    """`POST /v1/images/edits`, a form."""

    prompt: Label = Field(description="The class that the image shall become.")


class Upload(Body, ImageForm):
    """`POST /v1/tokens/encode`, a form."""

    image: UploadFile = Field(description="A raster image: PNG, JPEG, WebP, …")
    num_tokens: int | None = Field(None, description="The first that many tokens; all if left out.")
    search: Search = 0
    whole: bool = Field(False, description="The whole image in its own shape; else its centre square.")
    model: str | None = None


class Look(Body, ImageForm):
    """`POST /v1/tokens/reconstruct`, a form."""

    image: UploadFile = Field(description="A raster image; its centre square is taken.")
    num_tokens: list[int] | None = Field(None, description="Once for each stage; 1, 2, 4, … and all if left out.")
    search: Search = 0
    model: str | None = None


class Tokens(Body):
    """`POST /v1/tokens/decode`."""

    tokens: list[Code] = Field(
        min_length=1, max_length=100_000, description="The codes of one image, from the first on."
    )
    num_tokens: int | list[int] | None = Field(
        None, description="Show the image of that many tokens, or one image for each number; all tokens if left out."
    )
    height: int | None = Field(None, description="Of the full image, if it is not square: as `encode` said.")
    width: int | None = None
    model: str | None = None


class Usage(BaseModel):
    """Tokens, as OpenAI's API counts them."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: dict[str, int]


class ImageData(BaseModel):
    """An image of an answer."""

    b64_json: str
    tokens: list[int]
    size: str


class Images(BaseModel):
    """A list of images."""

    created: int
    data: list[ImageData]
    output_format: Literal["png"] = "png"
    background: Literal["opaque"] = "opaque"
    quality: Literal["auto"] = "auto"
    size: str
    usage: Usage
    model: str
    seed: int | None = None


class Stage(BaseModel):
    """What a number of tokens shows."""

    num_tokens: int
    size: int


class Model(BaseModel):
    """A model, and what it can do."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "detailflow"
    num_classes: int
    image_size: int
    stages: list[Stage]
    codebook_size: int
    fingerprint: str
    gpt_fingerprint: str
    sampling: dict[str, Any]
    limits: dict[str, int | float]


class Models(BaseModel):
    """`GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[Model]


class ImageClass(BaseModel):
    """A class of the model."""

    id: int
    name: str
    names: str
    wordnet_id: str | None


class Classes(BaseModel):
    """`GET /v1/classes`."""

    object: Literal["list"] = "list"
    total: int
    data: list[ImageClass]


class Encoded(BaseModel):
    """`POST /v1/tokens/encode`: the tokens of an image of height × width pixels."""

    model: str
    fingerprint: str
    tokens: list[int]
    height: int
    width: int


class Problem(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Failure(BaseModel):
    """An answer that is not a success."""

    error: Problem


class Health(BaseModel):
    """`GET /healthz` and `/readyz`."""

    status: Literal["ok", "stopping", "failed"]
