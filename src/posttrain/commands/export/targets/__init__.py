"""What a result can be exported to (`posttrain export --to`): a file a target, found by listing this folder. An installed package
adds others by entry points of the group `posttrain.export_targets`."""
