"""What the bundles' configs need beyond MONAI: SimCroP itself, and the house around it.

SimCroP, one idea a file; whoever has read these has read the method:
    vit.py          patches, positions, blocks, encoder: in the order in which a voxel meets them
    text.py         report -> sentences -> frozen text encoder
    simcrop.py      pre-training network: decoders, aligner, fusion; sentence maps and findings of new volumes
    losses.py       the three losses and their sum; how a sentence is scored in a volume
    probe.py        linear probe, its loss, its inferer
    unetr.py        UNETR for patches that are no cubes
    cpu.py          kernels and settings that only CPUs need
    distributed.py  errors.py  files.py  ground: training in many processes, errors in one line, files that are always
    processes.py    whole and have one writer, runs that signals end in order

ask.py          trained weights of any bundle, asked from Python

data/ how scans and reports come in, and how results go out:
    read.py         a CT or a label map from disk, with every check
    lists.py        reports, labels, MSD-style lists, folders of scans -> MONAI datalists
    tables.py       the CSV and JSON files that these are in
    findings.py     scans whose sentences have masks: ReXGroundingCT, tables, phantoms
    save.py         maps, labels and probabilities to disk
    volume.py       NIfTI, and what a plausible CT is: without torch
    nrrd.py  metaimage.py  dicom.py        the other formats; decompress.py: compressed slices, in a process of its own
    sources.py      public data sets as their publishers ship them
    prepare.py      raw data set -> analysis-ready volumes
    phantom.py      the demo's cohort
    anatomy.py      the same on two real scans, deformed

run/ what a training or an inference needs beyond MONAI's engines:
    start.py        the first call of every config
    keys.py         keys against the bundle's schema, and the key reference
    precision.py    bfloat16 or float32
    inferers.py     autocast, windows, scans that cannot be read
    handlers.py     progress, optimiser steps, clipping
    resume.py       checkpoints, best weights, losses that are not finite
    seeded.py       batches that follow from seed and place
    weights.py      load, save, start from
    description.py  what weights say of themselves
    published.py    import of the authors' checkpoints
    features.py     features of a frozen encoder, online or kept on disk
    export.py       a bundle that runs without this repository

evaluation/ what the results are worth:
    pretrain.py  classify.py  segment.py   one file a bundle
    zero_shot.py    of pretrain: findings by prompts, and retrieval, of weights alone
    places.py  retrieval.py     of pretrain: places of sentences, volumes of reports
    grounding.py    of pretrain: sentences against masks of findings; cells.py, masks.py: finer maps, arithmetic
    controls.py     untrained copy, HU histogram, raw statistics
    compare.py      contenders at fractions of the labels, by running the bundle
    metrics.py  report.py  figures.py      scores and intervals, tables, pictures

Class names, columns, paths and schedules stand in the configs: a new data set is a new overlay. The contracts in
pyproject.toml hold who may import whom.
"""
