"""Run by test_build.py with webdataset 0.2.86: prints what it and open_clip_train read from our tars."""

import argparse
import glob
import json
import sys

import webdataset
from open_clip_train.data import get_wds_dataset

folder = sys.argv[1]
tars = sorted(glob.glob(f"{folder}/train/*.tar"))
plain = webdataset.WebDataset(tars, shardshuffle=False)
arguments = argparse.Namespace(
    train_data=f"{folder}/train/train-{{000000..{len(tars) - 1:06d}}}.tar",
    val_data=None,
    train_num_samples=None,
    val_num_samples=None,
    train_data_upsampling_factors=None,
    dataset_resampled=False,
    batch_size=1,
    workers=1,
    seed=0,
    world_size=1,
    use_long_id=False,
)
data = get_wds_dataset(
    arguments, lambda image: image.size[0], is_train=True, tokenizer=lambda caption: [caption]
)
captions = [caption for _, texts in data.dataloader for caption in texts]
print(
    json.dumps(
        {
            "version": webdataset.__version__,
            "webdataset": [[sample["__key__"], sample["txt"].decode()] for sample in plain],
            "open_clip": captions,
        }
    )
)
