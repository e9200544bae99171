"""LCM: a trainer of our own for the paper's setting, `student`, and an extension of diffusers' scripts, `teacher_schedule`.

`student` is the paper's LCM-LoRA row (appendix A): an LCM-LoRA as the one-step generator of score distillation, Eq. 8.

    accelerate launch -m disback_adapters.lcm_lora student --teacher DIR_OR_HUB --prompts FILE --output DIR ...
"""
