# The jobs behind paper_table.sh: files in, files out, in the folder that paper_table.py names, as its grid.json says.
import re
from pathlib import Path

MODELS, CELLS, WORDS, RUN = (config[key] for key in ("models", "cells", "words", "command"))
MEASURED = [
    *(f"{model}.original" for model in MODELS),
    *(f"flops/{name}.json" for name in (*MODELS, *CELLS)),
    *(f"records/{cell}.json" for cell in CELLS),
    *(f"{kind}/{cell}.done" for kind in ("speed", "tasks") for cell in CELLS),
]


wildcard_constraints:
    model="|".join(map(re.escape, MODELS)),
    cell="|".join(map(re.escape, CELLS)),


rule cells:
    input:
        MEASURED,


# What there is: a cell that failed leaves no file, but a log whose last words the table shows.
rule table:
    input:
        [path for path in MEASURED if Path(path).is_file()],
        sorted(map(str, Path("logs").glob("*/*.txt"))),
    output:
        "paper_table.md",
    params:
        cells=CELLS,
    log:
        "table.txt",
    shell:
        "{config[writer]} . > {log:q} 2>&1"


rule original:
    output:
        touch("{model}.original"),
    input:
        lambda found: MODELS[found.model]["files"],
    params:
        model=lambda found: MODELS[found.model]["path"],
        evaluate=WORDS["evaluate"],
        tasks=WORDS["tasks"],
    log:
        "logs/original/{model}.txt",
    threads: config["threads"]
    shell:
        "({RUN} evaluate {params.model} results=. threads={threads} {params.evaluate} &&"
        " {RUN} tasks {params.model} results=. threads={threads} {params.tasks}) > {log:q} 2>&1"


rule flops_of_original:
    output:
        "flops/{model}.json",
    params:
        model=lambda found: MODELS[found.model]["path"],
        flops=WORDS["flops"],
    log:
        "logs/flops/{model}.txt",
    shell:
        "{RUN} flops {params.model} results=. {params.flops} > {log:q} 2>&1"


rule compress:
    output:
        temp(directory("checkpoints/{cell}")),
    input:
        lambda found: MODELS[CELLS[found.cell]["model"]]["files"],
    params:
        recipe=lambda found: CELLS[found.cell]["recipe"],
        model=lambda found: MODELS[CELLS[found.cell]["model"]]["path"],
        compress=WORDS["compress"],
    log:
        "logs/compress/{cell}.txt",
    threads: config["threads"]
    shell:
        "{RUN} compress {params.recipe:q} model={params.model} eval=false out={output:q} results=. threads={threads} {params.compress}"
        " > {log:q} 2>&1"


rule evaluate:
    output:
        "records/{cell}.json",
    input:
        "checkpoints/{cell}",
        lambda found: f"{CELLS[found.cell]['model']}.original",
    params:
        evaluate=WORDS["evaluate"],
    log:
        "logs/evaluate/{cell}.txt",
    threads: config["threads"]
    shell:
        "{RUN} evaluate {input[0]:q} name={wildcards.cell:q} results=. threads={threads} {params.evaluate} > {log:q} 2>&1"


rule tasks:
    output:
        touch("tasks/{cell}.done"),
    input:
        "checkpoints/{cell}",
        lambda found: f"{CELLS[found.cell]['model']}.original",
    params:
        tasks=WORDS["tasks"],
    log:
        "logs/tasks/{cell}.txt",
    threads: config["threads"]
    shell:
        "{RUN} tasks {input[0]:q} results=. threads={threads} {params.tasks} > {log:q} 2>&1"


rule flops:
    output:
        "flops/{cell}.json",
    input:
        "checkpoints/{cell}",
    params:
        flops=WORDS["flops"],
    log:
        "logs/flops/{cell}.txt",
    shell:
        "{RUN} flops {input:q} results=. {params.flops} > {log:q} 2>&1"


# Alone on its machine: whatever else ran would be in the times.
rule speed:
    output:
        touch("speed/{cell}.done"),
    input:
        "checkpoints/{cell}",
    params:
        speed=WORDS["speed"],
    log:
        "logs/speed/{cell}.txt",
    threads: workflow.cores
    shell:
        "{RUN} speed {input:q} results=. {params.speed} > {log:q} 2>&1"
