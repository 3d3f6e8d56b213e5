"""Private training in the user's own loop: plain PyTorch, no Trainer, no import of lightning.

Example::

    with make_private(model, optimizer, loader, loss_fn, epochs=10, target_epsilon=3.0) as private:
        for _ in range(10):
            for batch in private.loader:
                private.step(batch)
        print(private.privacy_statement())
"""

from lightning_dp.loop.run import PrivateLoop, make_private

__all__ = ["PrivateLoop", "make_private"]
