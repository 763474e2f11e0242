"""What the nodes use of ComfyUI's third interface: schemas are kept, outputs are tuples."""

from types import SimpleNamespace


class _Kind:
    class Input:
        def __init__(self, id, display_name=None, optional=False, tooltip=None, **settings):
            self.id, self.settings = id, settings

    class Output:
        def __init__(self, id=None, display_name=None, tooltip=None, **settings):
            self.id = id


class _Schema:
    def __init__(
        self,
        node_id,
        display_name=None,
        category="sd",
        inputs=None,
        outputs=None,
        hidden=None,
        description="",
        is_input_list=False,
        is_output_node=False,
        **settings,
    ):
        self.__dict__.update(locals())


class _NodeOutput:
    def __init__(self, *args, ui=None, expand=None, block_execution=None):
        self.args, self.ui = args, ui


class _PreviewText:
    def __init__(self, value, **kwargs):
        self.value = value


io = SimpleNamespace(
    ComfyNode=type("ComfyNode", (), {}),
    Schema=_Schema,
    NodeOutput=_NodeOutput,
    **dict.fromkeys(("Model", "Combo", "Float", "Boolean", "String", "Image"), _Kind),
)
ui = SimpleNamespace(PreviewText=_PreviewText)
ComfyExtension = type("ComfyExtension", (), {})
