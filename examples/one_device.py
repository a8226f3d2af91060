"""One device learns its stream of tasks, without a server: train, test, read the matrices, classify images.

    python examples/one_device.py
    python examples/one_device.py --method lightcl-plus --epochs 10

Needs the extra `data` (the digits come with scikit-learn): pip install -e '.[data]'
"""

import argparse

import lightcl


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--method", default="lightcl", help="a continual-learning method (default: %(default)s)")
    parser.add_argument("--tasks", type=int, default=5, help="tasks of two digits each (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=5, help="epochs per task (default: %(default)s)")
    args = parser.parse_args()

    # A bundled scenario with changes. A path or a dictionary works too; a wrong key is an error that names it.
    scenario = lightcl.load_scenario(
        "quickstart",
        {"method.name": args.method, "stream.tasks": args.tasks, "training.epochs": args.epochs},
    )

    with lightcl.open_device(scenario, number=0) as device:
        for task in device.tasks:
            trained = device.learn(task)
            tested = device.evaluate()
            print(
                f"task {task.id}, classes {task.classes}: {len(task.train)} images, loss {trained.loss:.3f}, "
                f"accuracy per task {[round(accuracy, 2) for accuracy in tested.til]}"
            )

        for setting, meaning in (("til", "task known"), ("cil", "task not known")):
            matrix = device.matrix(setting)
            if matrix.last >= 0:  # some methods are only tested with the task known
                print(f"\naccuracy, {meaning}; row t is after task t, column k is task k:")
                print(matrix.values.round(2))
                print(f"average accuracy {matrix.average_accuracy():.2f}")

        first = device.tasks[0]
        eight = first.test.only(slice(0, 8))
        images = eight.images().permute(0, 2, 3, 1).numpy()  # [N, H, W, C], uint8
        print(f"\ntest images of task {first.id}: true {eight.labels.tolist()}")
        print(f"predicted as {device.predict(images, task=first).tolist()}")


if __name__ == "__main__":
    main()
