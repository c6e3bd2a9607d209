"""Tiny data sets in the place of the real ones that lmms-eval's own tasks name, with their columns and types.

The images are scenes, which the embedded model can see, and the questions are worded as it knows them: its
answers are right and wrong, and change under a steering. `repositories` is what the hub of `hub.py` serves.
"""

import io
from typing import Any

from datasets import Image, Value
from lmms_runs import parquet

from hones_eval.toy import captions, scenes
from hones_eval.toy.drawing import draw, to_image
from hones_eval.toy.questions import TEXT as WORDING

TEXT, TRUTH = Value("string"), Value("bool")
INT8, INT32, INT64 = Value("int8"), Value("int32"), Value("int64")
FLOATS, TEXTS = [Value("float32")], [TEXT]
PICTURE = Image()

COUNT = 4
SCENES = [scenes.scene("test", index) for index in range(COUNT)]
NAMES = ["stop", "one way", "exit", "sale"]


def shown(index: int) -> dict[str, Any]:
    """The image of a scene, as `datasets` stores it."""
    file = io.BytesIO()
    to_image(draw(scenes.scene("test", index))).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def card(*configs: tuple[str, str]) -> bytes:
    """A data set's README that names its configurations, each with one split in a folder of its name."""
    entries = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: {split}\n    path: {name}/{split}-*\n"
        for name, split in configs
    )
    return f"---\nconfigs:\n{entries}---\n".encode()


def shard(split: str, folder: str = "data") -> str:
    return f"{folder}/{split}-00000-of-00001.parquet"


def colour_question(index: int) -> tuple[str, str]:
    """A question with a word for an answer, and the answer."""
    thing = SCENES[index].things[0]
    return WORDING["color"].format(shape=thing.shape), thing.color


def yes_no_question(index: int, *, yes: bool) -> tuple[str, str]:
    present = [thing.shape for thing in SCENES[index].things]
    shape = next(item for item in scenes.SHAPES if (item in present) == yes)
    return WORDING["exists"].format(shape=shape), "yes" if yes else "no"


def repositories() -> dict[str, dict[str, bytes]]:
    """The data sets of all benchmarks, name to path to content."""
    return {
        "lmms-lab-encoder/VQAv2": {shard("validation"): vqav2()},
        "lmms-lab-encoder/GQA": gqa(),
        "lmms-lab-encoder/textvqa": {shard("validation"): textvqa()},
        "lmms-lab-encoder/DocVQA": {
            "README.md": card(("DocVQA", "validation")),
            shard("validation", "DocVQA"): docvqa(),
        },
        "lmms-lab-encoder/POPE": {shard("test"): pope()},
        "lmms-lab-encoder/MME": {shard("test"): mme()},
        "lmms-lab-encoder/ScienceQA": {
            "README.md": card(("ScienceQA-IMG", "test")),
            shard("test", "ScienceQA-IMG"): scienceqa(),
        },
        "lmms-lab-encoder/COCO-Caption": {shard("val"): coco_captions()},
        "lmms-lab-encoder/flickr30k": {shard("test"): flickr30k()},
        "lmms-lab-encoder/NoCaps": {shard("validation"): nocaps()},
        "lmms-lab-encoder/RefCOCO": {shard("val"): refcoco()},
        "echo840/OCRBench": {shard("test"): ocrbench()},
        "lmms-lab-encoder/MMMU": {shard("validation"): mmmu()},
        "lmms-lab-encoder/SEED-Bench": {shard("test"): seedbench()},
    }


def vqav2() -> bytes:
    rows = []
    for i in range(COUNT):
        question, answer = colour_question(i)
        people = [{"answer": answer, "answer_confidence": "yes", "answer_id": k} for k in range(1, 11)]
        people[-1]["answer"] = "dark"
        rows.append(
            {
                "question_type": "what color is the",
                "multiple_choice_answer": answer,
                "answers": people,
                "image_id": i,
                "answer_type": "other",
                "question_id": 1000 + i,
                "question": question,
                "image": shown(i),
            }
        )
    return parquet(
        rows,
        question_type=TEXT,
        multiple_choice_answer=TEXT,
        answers=[{"answer": TEXT, "answer_confidence": TEXT, "answer_id": INT64}],
        image_id=INT64,
        answer_type=TEXT,
        question_id=INT64,
        question=TEXT,
        image=PICTURE,
    )


def gqa() -> dict[str, bytes]:
    """Questions and images are two configurations, which the task joins."""
    asked, seen = "testdev_balanced_instructions", "testdev_balanced_images"
    rows = []
    for i in range(COUNT):
        question, answer = colour_question(i)
        rows.append(
            {
                "id": f"2015{i}",
                "imageId": f"n{i}",
                "question": question,
                "answer": answer,
                "fullAnswer": f"The shape is {answer}.",
                "isBalanced": True,
                "groups": {"global": "color", "local": "06-shape_color"},
                "entailed": "[]",
                "equivalent": "[]",
                "types": {"structural": "query", "semantic": "attr", "detailed": "attributeType"},
                "annotations": {"question": [], "answer": [], "fullAnswer": []},
                "semantic": [{"operation": "select", "argument": "shape", "dependencies": []}],
                "semanticStr": "select: shape -> query: color [0]",
            }
        )
    marked = [{"objectId": TEXT, "value": TEXT}]
    questions = parquet(
        rows,
        id=TEXT,
        imageId=TEXT,
        question=TEXT,
        answer=TEXT,
        fullAnswer=TEXT,
        isBalanced=TRUTH,
        groups={"global": TEXT, "local": TEXT},
        entailed=TEXT,
        equivalent=TEXT,
        types={"structural": TEXT, "semantic": TEXT, "detailed": TEXT},
        annotations={"question": marked, "answer": marked, "fullAnswer": marked},
        semantic=[{"operation": TEXT, "argument": TEXT, "dependencies": [INT32]}],
        semanticStr=TEXT,
    )
    pictures = parquet([{"id": f"n{i}", "image": shown(i)} for i in range(COUNT)], id=TEXT, image=PICTURE)
    return {
        "README.md": card((asked, "testdev"), (seen, "testdev")),
        shard("testdev", asked): questions,
        shard("testdev", seen): pictures,
    }


def textvqa() -> bytes:
    rows = [
        {
            "image_id": f"00{i}",
            "question_id": 34602 + i,
            "question": "what is the word?",
            "question_tokens": ["what", "is", "the", "word"],
            "image": shown(i),
            "image_width": scenes.SIDE,
            "image_height": scenes.SIDE,
            "flickr_original_url": "",
            "flickr_300k_url": "",
            "answers": [SCENES[i].word.lower()] * 7 + ["sign"] * 3,
            "image_classes": ["Sign"],
            "set_name": "val",
            "ocr_tokens": [SCENES[i].word],
        }
        for i in range(COUNT)
    ]
    return parquet(
        rows,
        image_id=TEXT,
        question_id=INT32,
        question=TEXT,
        question_tokens=TEXTS,
        image=PICTURE,
        image_width=INT32,
        image_height=INT32,
        flickr_original_url=TEXT,
        flickr_300k_url=TEXT,
        answers=TEXTS,
        image_classes=TEXTS,
        set_name=TEXT,
        ocr_tokens=TEXTS,
    )


def docvqa() -> bytes:
    rows = [
        {
            "questionId": str(49153 + i),
            "question": "What is the word?",
            "question_types": ["handwritten", "form"],
            "image": shown(i),
            "docId": 14465 + i,
            "ucsf_document_id": "pybv0228",
            "ucsf_document_page_no": "81",
            "answers": [SCENES[i].word, SCENES[i].word.lower()],
            "data_split": "val",
        }
        for i in range(COUNT)
    ]
    return parquet(
        rows,
        questionId=TEXT,
        question=TEXT,
        question_types=TEXTS,
        image=PICTURE,
        docId=INT64,
        ucsf_document_id=TEXT,
        ucsf_document_page_no=TEXT,
        answers=TEXTS,
        data_split=TEXT,
    )


def pope() -> bytes:
    rows = []
    for i in range(COUNT):
        question, answer = yes_no_question(i, yes=i % 2 == 0)
        rows.append(
            {
                "id": str(i),
                "question_id": str(i + 1),
                "question": question,
                "answer": answer,
                "image_source": f"COCO_val2014_{i:012d}",
                "image": shown(i),
                "category": "adversarial",
            }
        )
    return parquet(
        rows,
        id=TEXT,
        question_id=TEXT,
        question=TEXT,
        answer=TEXT,
        image_source=TEXT,
        image=PICTURE,
        category=TEXT,
    )


def mme() -> bytes:
    """Two questions on each image, one whose answer is yes and one whose answer is no."""
    rows = []
    for i in range(COUNT):
        # The last image is a question of cognition, which has a metric of its own.
        category = ("existence", "existence", "color", "commonsense_reasoning")[i]
        for yes in (True, False):
            question, answer = yes_no_question(i, yes=yes)
            rows.append(
                {
                    "question_id": f"{category}/{i:04d}.jpg",
                    "image": shown(i),
                    "question": f"{question} Please answer yes or no.",
                    "answer": answer.capitalize(),
                    "category": category,
                }
            )
    return parquet(rows, question_id=TEXT, image=PICTURE, question=TEXT, answer=TEXT, category=TEXT)


def scienceqa() -> bytes:
    rows = []
    for i in range(COUNT):
        question, answer = colour_question(i)
        choices = sorted({answer, *scenes.COLORS[:3]})
        rows.append(
            {
                "image": shown(i),
                "question": question,
                "choices": choices,
                "answer": choices.index(answer),
                "hint": "" if i % 2 else "Look at the image.",
                "task": "closed choice",
                "grade": "grade2",
                "subject": "natural science",
                "topic": "physics",
                "category": "Materials",
                "skill": "Identify colours",
                "lecture": "",
                "solution": "",
            }
        )
    texts = ["hint", "task", "grade", "subject", "topic", "category", "skill", "lecture", "solution"]
    return parquet(
        rows, image=PICTURE, question=TEXT, choices=TEXTS, answer=INT8, **dict.fromkeys(texts, TEXT)
    )


def coco_captions() -> bytes:
    rows = [
        {
            "question_id": f"COCO_val2014_{i:012d}.jpg",
            "image": shown(i),
            "question": "Please carefully observe the image and come up with a caption for the image",
            "answer": captions.captions(SCENES[i]),
            "id": 100 + i,
            "license": 3,
            "file_name": f"COCO_val2014_{i:012d}.jpg",
            "coco_url": "",
            "height": scenes.SIDE,
            "width": scenes.SIDE,
            "date_captured": "2013-11-14 11:18:45",
        }
        for i in range(COUNT)
    ]
    return parquet(
        rows,
        question_id=TEXT,
        image=PICTURE,
        question=TEXT,
        answer=TEXTS,
        id=INT64,
        license=INT64,
        file_name=TEXT,
        coco_url=TEXT,
        height=INT64,
        width=INT64,
        date_captured=TEXT,
    )


def flickr30k() -> bytes:
    rows = [
        {
            "image": shown(i),
            "caption": captions.captions(SCENES[i]),
            "sentids": [str(5 * i + k) for k in range(5)],
            "img_id": str(i),
            "filename": f"{1000092795 + i}.jpg",
        }
        for i in range(COUNT)
    ]
    return parquet(rows, image=PICTURE, caption=TEXTS, sentids=TEXTS, img_id=TEXT, filename=TEXT)


def nocaps() -> bytes:
    """Ten captions an image, as there."""
    rows = [
        {
            "image": shown(i),
            "image_coco_url": "",
            "image_date_captured": "2018-11-06 11:04:33",
            "image_file_name": f"{i:016d}.jpg",
            "image_height": scenes.SIDE,
            "image_width": scenes.SIDE,
            "image_id": i,
            "image_license": 0,
            "image_open_images_id": f"{i:016d}",
            "annotations_ids": [10 * i + k for k in range(10)],
            "annotations_captions": [*captions.captions(SCENES[i]), *captions.captions(SCENES[i])],
        }
        for i in range(COUNT)
    ]
    return parquet(
        rows,
        image=PICTURE,
        image_coco_url=TEXT,
        image_date_captured=TEXT,
        image_file_name=TEXT,
        image_height=INT32,
        image_width=INT32,
        image_id=INT32,
        image_license=INT8,
        image_open_images_id=TEXT,
        annotations_ids=[INT32],
        annotations_captions=TEXTS,
    )


def refcoco() -> bytes:
    """One thing of each scene with two descriptions, which the grounding tasks make two examples of."""
    rows = []
    for i in range(COUNT):
        thing = SCENES[i].things[0]
        left, top, right, bottom = thing.box
        rows.append(
            {
                "question_id": str(i),
                "image": shown(i),
                "question": "Please carefully observe the area circled in the image and come up with a "
                "caption for the area.",
                "answer": [f"the {captions.phrase(thing)}", f"the {thing.size} {thing.shape}"],
                "segmentation": [float(x) for x in (left, top, right, top, right, bottom)],
                "bbox": [float(x) for x in (left, top, right - left, bottom - top)],
                "iscrowd": 0,
                "file_name": f"COCO_train2014_{i:012d}_0.jpg",
            }
        )
    return parquet(
        rows,
        question_id=TEXT,
        image=PICTURE,
        question=TEXT,
        answer=TEXTS,
        segmentation=FLOATS,
        bbox=FLOATS,
        iscrowd=INT64,
        file_name=TEXT,
    )


def ocrbench() -> bytes:
    kinds = ["Regular Text Recognition", "Digit String Recognition", "Scene Text-centric VQA"]
    rows = [
        {
            "dataset": ("IIIT5K", "HME100k")[i % 2],
            "question": "Transcribe the text inside the blue box.\nOutput text only.",
            "question_type": kinds[i % 3],
            "answer": [SCENES[i].word],
            "image": shown(i),
        }
        for i in range(COUNT)
    ]
    return parquet(rows, dataset=TEXT, question=TEXT, question_type=TEXT, answer=TEXTS, image=PICTURE)


def mmmu() -> bytes:
    """One, two or three images a question, and a question without choices."""
    rows = []
    for i in range(COUNT):
        count = 1 + i % 3
        names = [f"<image {k}>" for k in range(1, count + 1)]
        _, colour = colour_question(i)
        choices = sorted({colour, *scenes.COLORS[:3]})
        is_open = i == COUNT - 1
        places = [i, COUNT + 2 * i, COUNT + 2 * i + 1]  # no image is shown with two questions
        pictures = {f"image_{k}": shown(places[k - 1]) if k <= count else None for k in range(1, 8)}
        rows.append(
            {
                "id": f"validation_{('Art', 'Math', 'History', 'Math')[i]}_{i}",
                "question": f"{' and '.join(names)} What color is the {SCENES[i].things[0].shape}?",
                "options": "[]" if is_open else str(choices),
                "explanation": "",
                **pictures,
                "img_type": "['Paintings']",
                "answer": colour if is_open else "ABCDEF"[choices.index(colour)],
                "topic_difficulty": "Easy",
                "question_type": "open" if is_open else "multiple-choice",
                "subfield": "Drawing",
            }
        )
    texts = ["id", "question", "options", "explanation", "img_type", "answer", "topic_difficulty"]
    return parquet(
        rows,
        **dict.fromkeys([*texts, "question_type", "subfield"], TEXT),
        **dict.fromkeys([f"image_{k}" for k in range(1, 8)], PICTURE),
    )


def seedbench() -> bytes:
    """Questions of four choices, of which the right one changes its place."""
    rows = []
    for i in range(COUNT):
        question, answer = colour_question(i)
        offered = [answer, *(item for item in ("red", "green", "blue", "yellow") if item != answer)][:4]
        offered = offered[i % 4 :] + offered[: i % 4]
        named = {f"choice_{letter}": one for letter, one in zip("abcd", offered, strict=True)}
        rows.append(
            {
                "answer": "ABCD"[offered.index(answer)],
                **named,
                "data_id": f"{i}",
                "data_type": "image",
                "question": question,
                "question_id": str(i),
                "question_type_id": 5,
                "image": [shown(i)],
                "segment": [],
            }
        )
    texts = ("answer", *(f"choice_{letter}" for letter in "abcd"), "data_id", "data_type", "question")
    return parquet(
        rows,
        **dict.fromkeys(texts, TEXT),
        question_id=TEXT,
        question_type_id=INT64,
        image=[PICTURE],
        segment=[INT64],
    )
