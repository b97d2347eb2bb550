"""One layer type a file: how the input of each kind of layer becomes rows; and which modules are targets."""
