"""Name and figures of the small saved model that the tests of this folder share."""

NAME = 'favit_small64.cifar10'
METRICS = {
    'data': 'CIFAR-10 (JPEG)',
    'split': 'official test split',
    'num_test': 10000,
    'metrics': {'top1': 12.5, 'top1_ci95': [11.9, 13.2], 'ece': 0.031},
    'training': {
        'command': 'vishub train classification --model favit_small64',
        'seed': 3, 'epochs': 1, 'wall_s': 3600.0, 'hardware': '2 CPU cores', 'recipe': {'lr': 0.001},
    },
}
