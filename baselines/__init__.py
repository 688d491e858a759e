"""What RPO is compared with: `python -m baselines dreambooth --subject data/dog`, one method a file.

A baseline is a subclass of train.RPO in baselines/NAME.py, named there as METHOD:

- `Settings`: a frozen dataclass, its flags and defaults (support/settings.py), derived from train.RPOSettings, or from
  train.Settings if `prepare` and `loss` are replaced; `result`: the default of --ckpt
- `prepare()`: what θ₀ draws and what is encoded before the loop; `batch(step)`: the random draws of a step
- `loss(batch)`: a NamedTuple of tensors with `total`, which is minimised, and `similarity`; all go to the history
- `trained(unet)`: which parameters learn, if not all

A batch is a NamedTuple of tensors (n, ...), n pairs a step, or None. It has the fields `p` and `label`, None if there
are no labels. `Settings.pictures_a_pair` says how many pictures θ sees for a pair, for the estimate of memory.

`Settings.also_trained` names parts of the base that learn too, such as "text_encoder". They are in the checkpoint, and
in self.sd once prepare() has called `machine.free_base()`.

The loop, validation, files, --resume, LoRA and several processes are train.py's. Something else that learns, such as a
critic, is added to `self.record.learning`, so that --resume restores it.
"""
