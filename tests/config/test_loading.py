"""YAML and flags to RunConfig: one path, nothing dropped, every error names the knob."""

from __future__ import annotations

import dataclasses
import typing
from operator import attrgetter
from pathlib import Path

import pytest

from tlcr.config.judging import AnswerConfig, JudgeConfig
from tlcr.config.loading import dump_config, knobs, load_command_config, load_config
from tlcr.config.schema import Arm, RewardConfig, RunConfig
from tlcr.errors import ConfigError


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_no_file_gives_the_defaults() -> None:
    assert load_config(None) == RunConfig()


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "# nothing yet\n")) == RunConfig()


def test_values_are_typed_and_the_rest_keeps_its_default(tmp_path: Path) -> None:
    cfg = load_config(
        write(tmp_path, "seeds: [3, 4]\nsft: {epochs: 5}\nppo: {learning_rate: 1e-5, whiten: no, clip_high: 0.3}\n")
    )
    assert cfg.seeds == (3, 4)
    assert cfg.ppo == dataclasses.replace(RunConfig().ppo, learning_rate=1e-5, whiten=False, clip_high=0.3)
    assert cfg.sft == dataclasses.replace(RunConfig().sft, epochs=5)
    assert cfg.sft.batch_size == RunConfig().sft.batch_size != RunConfig().reward_model.batch_size
    assert cfg.discriminator == RunConfig().discriminator


def test_an_override_wins_over_the_file_and_may_be_text_or_typed(tmp_path: Path) -> None:
    path = write(tmp_path, "ppo: {updates: 5, gamma: 0.5}\nmodel: {tokenizer: other}\n")
    cfg = load_config(path, {"ppo.updates": "7", "kl.coef": 0.3, "model.tokenizer": None})
    assert (cfg.ppo.updates, cfg.ppo.gamma, cfg.kl.coef, cfg.model.tokenizer) == (7, 0.5, 0.3, None)


def test_an_arm_names_only_what_differs_from_the_reward_around_it(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "reward: {scale: 2.0, clip: 3.0}\n"
        "arms:\n"
        "  - name: plain\n"
        "  - name: discrete\n"
        "    reward: {kind: discrete, clip: null}\n"
        "    kl_coefs: [0.2]\n",
    )
    cfg = load_config(path, {"reward.scale": 4.0})
    assert cfg.arms == (
        Arm("plain", RewardConfig(scale=4.0, clip=3.0)),
        Arm("discrete", RewardConfig(scale=4.0, clip=None, kind="discrete"), kl_coefs=(0.2,)),
    )


def test_dumped_and_loaded_is_the_same_config(tmp_path: Path) -> None:
    cfg = dataclasses.replace(
        RunConfig(),
        output_dir="runs/größer",
        seeds=(1, 2),
        reward=RewardConfig(kind="sign", clip=None),
        arms=(Arm("a", RewardConfig(kind="discrete", band=0.1)), Arm("b", RewardConfig(), kl_coefs=(0.0,))),
        ppo=dataclasses.replace(RunConfig().ppo, learning_rate=3e-7, target_kl=0.1),
    )
    assert load_config(write(tmp_path, dump_config(cfg))) == cfg


TEXTS = {
    *("gguf_file", "pad_token", "attn_implementation", "targets", "split", "span_end", "model_id"),
    *("model", "base_url", "key_variable", "extra_body", "server"),
}
"""Last names of the knobs that are texts and never paths."""


@pytest.mark.parametrize("cls", [RunConfig, AnswerConfig, JudgeConfig])
def test_every_path_may_begin_with_the_users_home(cls: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`output_dir: ~/x` made a folder named ~, and `model.path: ~/x` was not there."""
    monkeypatch.setenv("HOME", str(tmp_path))
    texts = [knob for knob in knobs(cls) if str in (knob.type, *typing.get_args(knob.type))]
    paths = [knob for knob in texts if knob.path.rpartition(".")[2] not in TEXTS]
    assert [knob for knob in knobs(cls) if knob.metadata.get("path")] == paths and paths
    for path in paths:
        several = typing.get_origin(path.type) is tuple
        values: dict[str, object] = {path.path: ["~/a b", "c"] if several else "~/a b"}
        values |= {"reviser.files": {"reviser.backend": "files"}, "reward.callable": {"reward.kind": "callable"}}.get(
            path.path, {}
        )
        cfg = load_config(None, values) if cls is RunConfig else load_command_config(cls(), None, values)
        found = attrgetter(path.path)(cfg)
        assert found == ((f"{tmp_path}/a b", "c") if several else f"{tmp_path}/a b"), path.path
        assert "~" not in dump_config(cfg)
    assert cls(output_dir="~").output_dir == str(tmp_path)
    assert cls(output_dir="a/~").output_dir == "a/~"


def test_the_defaults_survive_dumping(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, dump_config(RunConfig()))) == RunConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nppo:\n  updats: 3\n", ":3: unknown key ppo.updats; did you mean ppo.updates?"),
        ("updates: 3\n", ":1: unknown key updates; did you mean ppo.updates?"),
        ("labels: {xyzzy: 1}\n", "unknown key labels.xyzzy; known here: end_of_sequence"),
        ("ppo: 3\n", ":1: ppo is 3; it must be a mapping"),
        ("ppo:\n  updates: 1\n  updates: 2\n", ":3: ppo.updates stands twice, first on line 2"),
        ("ppo: {updates: 0}\n", "ppo.updates is 0; it must be at least 1"),
        ("sft: {epochs: 0}\n", "sft.epochs is 0; it must be at least 1"),
        ("ppo: {updates: null}\n", "ppo.updates is null; it must be a whole number"),
        ("ppo: {updates: 1.5}\n", "ppo.updates is 1.5; it must be a whole number"),
        ("ppo: {clip_high: wide}\n", "ppo.clip_high is wide; it must be a number or null"),
        ("kl: {placement: los}\n", "kl.placement is los; it must be one of reward, loss"),
        ("model: {trust_remote_code: maybe}\n", "model.trust_remote_code is maybe; it must be true or false"),
        ("seeds: []\n", "seeds is empty"),
        ("seeds: [1, 1]\n", "seeds has 1 twice"),
        ("lora: {roles: [value]}\n", "lora.roles has 'value' without 'policy'"),
        ("lora: {roles: []}\n", "lora.roles is empty; name at least one, or set rank: null"),
        ("lora: {targets: [all-linear, q_proj, lm_head]}\n", "all-linear stands for every layer; name it alone"),
        ("lora: {base_bits: 4}\n", "lora.base_bits is 4 and rank null"),
        ("lora: {base_bits: 8}\n", "lora.base_bits"),
        ("lora: {rank: 8, base_bits: 4}\nsharding: {kind: full}\n", "set sharding.kind: none, or lora.base_bits: null"),
        ("lora: {rank: 8, roles: [sft]}\n", "SFT starts from random weights there"),
        ("lora: {rank: 8}\nppo: {value_init: reward_model}\n", "set ppo.value_init: policy, or drop 'value'"),
        ("arms: 3\n", "arms is 3; it must be a list"),
        ("arms:\n- name: a\n  name: b\n", ":3: arms[0].name stands twice, first on line 2"),
        ("arms: [{name: a, reward: {kind: sign, kind: discrete}}]\n", "arms[0].reward.kind stands twice"),
        ("ppo: {updates: 1}\nppo.updates: 3\n", ":2: ppo.updates stands twice, with dots and in its section"),
        ("ppo.updates: 3\nppo: {updates: 1}\n", ":2: ppo.updates stands twice, with dots and in its section"),
        ("ppo: {learning_rate: .inf}\n", "ppo.learning_rate is inf; it must be a finite number"),
        ("kl: {coef: .nan}\n", "kl.coef is nan; it must be a finite number"),
        ("kl_coefs: [0.1, .nan]\n", "kl_coefs holds nan; it must be a finite number"),
        ('output_dir: "a\\0b"\n', "output_dir holds the character NUL"),
        ("ppo: {updates: " + "9" * 5000 + "}\n", "holds a value that cannot be read: Exceeds the limit"),
        ("model: " + "[" * 2000 + "]" * 2000 + "\n", "is nested too deeply to be read"),
        ("ppo: &a {updates: *a}\n", ":1: ppo.updates holds itself, by an alias"),
        ("model: " + str([list(range(100))] * 50) + "\n", "model is [[0, 1, 2, 3, 4, 5, ...], [0"),
        (
            "x0: &x0 [1, 2]\n" + "".join(f"x{i}: &x{i} [*x{i - 1}, *x{i - 1}]\n" for i in range(1, 40)),
            "stands for more than 100,000 values",
        ),
        ("arms: [{reward: {kind: sign}}]\n", "arms[0] has no name"),
        ("reviser: {endpoint: {base_url: 'http://me:my-password@host:1/v1'}}\n", "before @host:1"),
        ("rollout: {server: ['http://my-password@host']}\n", "the environment variable VLLM_API_KEY"),
        ("arms: [{name: a}, {name: a}]\n", "arms has 'a' twice"),
        ("arms: [{name: ../a}]\n", "it names a folder"),
        ("arms: [{name: a, reward: {knd: x}}]\n", "unknown key arms[0].reward.knd; did you mean arms[0].reward.kind?"),
        (
            "arms: [{name: a}, {name: b, reward: {clip: -1}}]\n",
            "arms[1].reward.clip is -1.0; it must be greater than 0",
        ),
        ("a: [\n", "is not YAML"),
        ("a: !!python/object/apply:os.getcwd []\n", "is not YAML"),
        ("- 1\n", "holds list, not a mapping"),
        ("no: null\n", "unknown key False"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line_that_names_the_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text))
    assert message in str(caught.value)
    assert "my-password" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sections_without_settings_have_the_defaults(tmp_path: Path) -> None:
    """A file in which all settings are comments."""
    for text in ("ppo:\n", "ppo:\nkl:\n", "{ppo, kl}\n", "# nothing\n"):
        assert load_config(write(tmp_path, text)) == RunConfig()


def test_numbers_of_yaml_1_2_are_read(tmp_path: Path) -> None:
    """YAML 1.1, which PyYAML reads, takes 1e-5 for text."""
    cfg = load_config(write(tmp_path, "kl_coefs: [1e-2]\nppo: {learning_rate: 1e-5}\nreward: {clip: 2E1}\n"))
    assert (cfg.kl_coefs, cfg.ppo.learning_rate, cfg.reward.clip) == ((0.01,), 1e-5, 20.0)


def test_a_missing_file_and_a_binary_file_are_config_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load_config(tmp_path / "binary.yaml")


def test_an_unknown_override_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown key ppo\.update; did you mean ppo\.updates\?"):
        load_config(None, {"ppo.update": 3})


def test_the_bounds_that_are_declared_are_kept() -> None:
    """Every declared bound refuses a value just outside it, whichever section it stands in."""
    tried = 0
    for knob in knobs(RunConfig):
        for name, step in (("ge", -1), ("gt", 0), ("le", 1)):
            bound = knob.metadata.get(name)
            if bound is None:
                continue
            with pytest.raises(ConfigError, match=f"^{knob.path.replace('.', '[.]')} is .*; it must be "):
                load_config(None, {knob.path: bound + step})
            tried += 1
    assert tried > 50


@pytest.mark.parametrize("knob", ["seed", "lora.alpha", "ppo.learning_rate", "data.limit", "ppo.updates"])
@pytest.mark.parametrize("number", [2**63, -(10**400), 10**4000])
def test_a_whole_number_that_nothing_holds_is_named(knob: str, number: int, tmp_path: Path) -> None:
    digits = f"{number:x}" if number > 0 else f"-{-number:x}"
    text = f"{knob}: {digits[0] if number < 0 else ''}0x{digits.lstrip('-')}"
    with pytest.raises(ConfigError, match=rf"^{knob} is .*; it must be a number that fits 64 bits$"):
        load_config(write(tmp_path, text))


@pytest.mark.parametrize("text", ["seeds: [0x%x]", "kl_coefs: [0x%x]", "arms: [{name: a, kl_coefs: [0x%x]}]"])
def test_so_is_one_in_a_list(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must fit 64 bits|that fits 64 bits"):
        load_config(write(tmp_path, text % 10**4000))


@pytest.mark.parametrize(("text", "value"), [("true", True), ("false", False), ("position", "position")])
def test_a_reward_is_centred_in_two_ways_or_not(tmp_path: Path, text: str, value: object) -> None:
    cfg = load_config(write(tmp_path, f"reward: {{centre: {text}}}\n"))
    assert cfg.reward.centre is value or cfg.reward.centre == value != "true"
    assert load_config(write(tmp_path, dump_config(cfg))) == cfg
    assert load_config(None, {"reward.centre": text}) == cfg
    with pytest.raises(ConfigError, match="true or false or one of position"):
        load_config(write(tmp_path, "reward: {centre: median}\n"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("reward: {overlong_buffer: 300}", "overlong_buffer is 300, more than rollout.max_new_tokens, 256"),
        ("arms: [{name: a, reward: {overlong_buffer: 300}}]", "overlong_buffer is 300"),
        ("reward: {overlong_buffer: 30}\nrollout: {environment: 'a:b'}", "makes conversations of several"),
        ("ppo: {keep_best: true}", "set evaluate_every"),
    ],
)
def test_settings_that_cannot_be_meant_together_are_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(write(tmp_path, text))
