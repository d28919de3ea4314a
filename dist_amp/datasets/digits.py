"""Handwritten digits that ship with scikit-learn, as a TFDS dataset."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

_EVERY_NTH_IS_TEST = 5


class Digits(tfds.core.GeneratorBasedBuilder):
    """1,797 scans of handwritten digits, 8x8 pixels of 17 grey levels.

    Splits: "train" with 1,437 examples and "test" with 360, every fifth.
    Features: `image`, uint8 `[8, 8, 1]` scaled to 0..255, and `label`, int64
    in 0..9.

    Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten
    Digits", UCI Machine Learning Repository, 1998, doi:10.24432/C50P49; the
    part that scikit-learn ships.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1)),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://doi.org/10.24432/C50P49",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        del dl_manager  # nothing to download
        return {
            "train": self._generate_examples(is_test=False),
            "test": self._generate_examples(is_test=True),
        }

    def _generate_examples(
        self, *, is_test: bool
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        from sklearn import datasets

        digits = datasets.load_digits()
        images = np.round(digits.images * (255 / 16)).astype(np.uint8)
        for index, (image, label) in enumerate(
            zip(images, digits.target, strict=True)
        ):
            if (index % _EVERY_NTH_IS_TEST == 0) == is_test:
                yield index, {"image": image[..., None], "label": int(label)}
