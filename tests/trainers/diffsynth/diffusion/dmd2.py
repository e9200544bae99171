"""Stand-in of modelscope/DiffSynth-Studio at fed7b18: names and order of calls of `diffsynth/diffusion/dmd2.py`."""

import torch


def net(module, role):
    return getattr(module.pipe, getattr(module, f"dmd2_{role}_model_name"))


class DMD2Loss:
    """dmd2.py:205-471: the score of the teacher without a gradient, and features of it for the discriminator."""

    def __init__(self, config):
        self.config, self.seen = config, []  # what the discriminator is given

    def features(self, module, x, sigma):  # dmd2.py:235-265
        found = module.dmd2_model_fn_teacher(module.pipe, net(module, "teacher"), x, sigma, return_features=True)
        self.seen.append((x.detach(), sigma, found.detach()))
        return found

    def __call__(self, module, inputs, iteration):
        student = iteration % self.config.student_update_freq == 0
        for role, train in (("student", student), ("fake_score", not student)):  # set_dmd2_train_phase, :69
            net(module, role).train(train).requires_grad_(train)
        sigma = torch.rand(len(inputs), 1) + 0.1
        with torch.set_grad_enabled(student):
            image = module.dmd2_model_fn_student(module.pipe, net(module, "student"), inputs, torch.ones_like(sigma))
            noised = image + sigma * torch.randn_like(image)
        adversarial, head = self.config.gan_loss_weight > 0, module.pipe.dmd2_discriminator
        if not student:  # :393
            loss = (
                module.dmd2_model_fn_fake_score(module.pipe, net(module, "fake_score"), noised, sigma) - image
            ).square()
            with torch.no_grad():
                features = self.features(module, noised, sigma) if adversarial else None
            return {"total_loss": loss.mean() + (head(features).exp().mean() if adversarial else 0.0)}
        with torch.no_grad():  # :351
            fake = module.dmd2_model_fn_fake_score(module.pipe, net(module, "fake_score"), noised, sigma)
            real = module.dmd2_model_fn_teacher(module.pipe, net(module, "teacher"), noised, sigma)
        loss = ((fake - real) * image).mean()
        if adversarial:  # the gradient flows through the teacher's features
            loss = loss + self.config.gan_loss_weight * head(self.features(module, noised, sigma)).exp().mean()
        return {"total_loss": loss}


def launch_dmd2_training_task(accelerator, data, model, model_logger, save_steps=None, limit=1.0):
    """dmd2.py:489-601."""
    make = {"lr": 1e-2, "weight_decay": 1e-2}
    names = {"student": "student", "fake_score": "fake_score"}
    if model.pipe.dmd2_discriminator is not None:
        names["discriminator"] = "discriminator"
    optimizers = {}
    for name, role in names.items():
        optimizers[name] = torch.optim.AdamW(net(model, role).parameters(), **make)
    config = model.dmd2_config
    prepared = accelerator.prepare(model, *optimizers.values())
    model, optimizers = prepared[0], dict(zip(optimizers, prepared[1:], strict=True))
    for iteration, inputs in enumerate(data):
        with accelerator.accumulate(model):
            loss = model(inputs, iteration=iteration)["total_loss"]
            student = iteration % config.student_update_freq == 0
            current = [optimizers[name] for name in names if (name == "student") is student]
            accelerator.backward(loss)
            if student:
                accelerator.clip_grad_norm_(net(accelerator.unwrap_model(model), "student").parameters(), limit)
            for optimizer in current:
                optimizer.step()
            for optimizer in current:
                optimizer.zero_grad(set_to_none=True)
            model_logger.on_step_end(accelerator, model, save_steps)
