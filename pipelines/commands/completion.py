"""`vqvae2 completion`: a script that completes subcommands, flags and recipes in a shell."""

from pipelines.cli import COMMANDS, flag_names, recipe_names
from pipelines.config import CompletionConfig

SCRIPT = """
_vqvae2() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD - 1]}}
    local command=${{COMP_WORDS[1]}} words=
    if [[ $COMP_CWORD -gt 1 && $command == codes ]]; then command+=" ${{COMP_WORDS[2]}}"; fi
    if [[ $COMP_CWORD -eq 1 ]]; then words="{first_words} --help --version"
    elif [[ $COMP_CWORD -eq 2 && $command == codes* ]]; then words="{second_words}"
    elif [[ $previous == --config ]]; then words="{recipes}"
    elif [[ $current == -* ]]; then
        case $command in
        {cases}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _vqvae2 vqvae2
"""


def completion_script(shell: str) -> str:
    """A script for bash, which zsh runs after two lines of its own; files complete by default."""
    words = [command.split() for command in COMMANDS]
    cases = [f"{command!r}) words={' '.join(flag_names(command))!r} ;;" for command in COMMANDS]
    script = SCRIPT.format(
        first_words=" ".join(dict.fromkeys(word[0] for word in words)),
        second_words=" ".join(word[1] for word in words if len(word) > 1),
        recipes=" ".join(recipe_names()),
        cases="\n        ".join(cases),
    )
    return ("autoload -Uz bashcompinit\nbashcompinit\n" if shell == "zsh" else "") + script.strip()


def completion(config: CompletionConfig) -> None:
    """Print the script."""
    print(completion_script(config.shell))
