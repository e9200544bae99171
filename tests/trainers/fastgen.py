"""Stand-in of NVlabs/FastGen at 34f30e8: the names and the calls of fastgen/trainer.py:57-235 and DMD2Model."""

from types import ModuleType, SimpleNamespace

import torch
from networks import Net

callbacks = ModuleType("fastgen.callbacks.callback")


class Callback:
    """fastgen/callbacks/callback.py:64-183, what is called of it."""

    def on_load_checkpoint_end(self, model, iteration=0): ...

    def on_train_end(self, model, iteration=0): ...

    def state_dict(self):
        return {}

    def load_state_dict(self, state_dict): ...


callbacks.Callback = Callback


class Network(Net):
    """fastgen/networks/EDM/network.py:887-970: features of inner layers, alone or as a list with the output first."""

    def forward(self, x, sigma, feature_indices=None, return_features_early=False):
        features = [self.inner[0](torch.cat([x, sigma.expand(len(x), 1)], dim=1))]
        if return_features_early:
            return features
        output = super().forward(x, sigma)
        return [output, features] if feature_indices else output


class DMD2Model:
    def __init__(self, freq=2, gan=0.0):
        torch.manual_seed(1)
        self.config = SimpleNamespace(student_update_freq=freq, gan_loss_weight_gen=gan)
        self.net, self.fake_score, self.teacher = Network(), Network(), Network().eval().requires_grad_(False)
        self.seen = []  # what the discriminator is given

    def init_optimizers(self):  # methods/model.py:533, dmd2.py:462
        self.net_optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-2)
        self.fake_score_optimizer = torch.optim.Adam(self.fake_score.parameters(), lr=1e-2)

    def single_train_step(self, iteration):
        student = iteration % self.config.student_update_freq == 0
        image = self.net(80 * torch.randn(8, 2), torch.full((8, 1), 80.0))
        sigma = torch.rand(8, 1) + 0.1
        self.fake_score.train(not student).requires_grad_(not student)  # dmd2.py:67-78
        noised = (image + sigma * torch.randn_like(image)).detach()
        if not student:
            if self.config.gan_loss_weight_gen > 0:  # dmd2.py:366-377
                features = self.teacher(noised, sigma, return_features_early=True, feature_indices={0})
                self.seen.append((noised, sigma, features[0].detach()))
            return (self.fake_score(noised, sigma) - image.detach()).square().mean()
        with torch.no_grad():
            fake = self.fake_score(noised, sigma)
        gan = 0.0
        if self.config.gan_loss_weight_gen > 0:  # dmd2.py:136-146, with the gradient through the teacher
            perturbed = image + (noised - image).detach()
            real, features = self.teacher(perturbed, sigma, feature_indices={0})
            self.seen.append((noised, sigma, features[0].detach()))
            gan = self.config.gan_loss_weight_gen * features[0].square().mean()
        else:
            real = self.teacher(noised, sigma)
        self.score = noised, sigma, real.detach()
        return ((fake - real.detach()) * image).mean() + gan

    def step(self, iteration):
        student = iteration % self.config.student_update_freq == 0
        optimizer = self.net_optimizer if student else self.fake_score_optimizer
        self.single_train_step(iteration).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


class Trainer:
    def __init__(self, *callbacks):
        self.callbacks = callbacks

    def run(self, model, iterations, checkpoint=None):
        model.init_optimizers()  # trainer.py:125
        start = 0
        if checkpoint is not None:  # :138-152, callbacks with the rest
            model.net.load_state_dict(checkpoint["net"])
            model.fake_score.load_state_dict(checkpoint["fake_score"])
            start = checkpoint["iteration"]
            for callback, state in zip(self.callbacks, checkpoint["callbacks"], strict=True):
                callback.load_state_dict(state)
        for callback in self.callbacks:
            callback.on_load_checkpoint_end(model, iteration=start)
        for iteration in range(start + 1, iterations + 1):
            model.step(iteration)
        saved = {"net": model.net.state_dict(), "fake_score": model.fake_score.state_dict(), "iteration": iterations}
        saved["callbacks"] = [callback.state_dict() for callback in self.callbacks]
        saved = {k: {n: t.clone() for n, t in v.items()} if k in ("net", "fake_score") else v for k, v in saved.items()}
        for callback in self.callbacks:
            callback.on_train_end(model, iteration=iterations)
        return saved
