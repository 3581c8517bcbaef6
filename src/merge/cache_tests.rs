use std::time::{Duration, SystemTime};

use super::*;
use crate::checkpoint::Checkpoint;
use crate::checkpoint::fixture::{self, Size, TINY};
use crate::merge::{Input, Recipe};

/// Tensors of several blocks.
const WIDE: Size = Size { hidden: 264, intermediate: 512, layers: 1, vocab: 1001 };
const MINUTE: Duration = Duration::from_secs(60);

struct Bench {
    dir: tempfile::TempDir,
    clock: Clock,
}

impl Bench {
    /// Members `init`, `a`, `b` and `c`, and a clock that is a minute ahead, so that their files count as settled.
    fn new(size: Size) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for (name, seed) in [("init", 0), ("a", 1), ("b", 2), ("c", 3)] {
            fixture::write(&dir.path().join(name), &fixture::config(size), &fixture::llama(size, "BF16", seed), 2).unwrap();
        }
        let clock = Clock::manual();
        clock.advance(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap() + MINUTE);
        Self { dir, clock }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn cache(&self, max_bytes: u64) -> Cache {
        Cache::open(&CacheOptions { dir: self.path("cache"), max_bytes }, self.clock.clone()).unwrap()
    }

    fn plan(&self, recipe: &str) -> Arc<MergePlan> {
        Arc::new(MergePlan::open(&Recipe::from_yaml(recipe, self.dir.path()).unwrap()).unwrap())
    }

    /// Merges and keeps, as a load does it.
    fn keep(&self, cache: &Cache, recipe: &str) -> Arc<Merged> {
        let plan = self.plan(recipe);
        let slot = cache.slot(&plan).unwrap();
        let merged = Arc::new(Merged::new(plan.clone()).unwrap());
        let recorder = slot.record(&merged).unwrap().unwrap();
        read_all(&recorder);
        slot.keep(recorder, &merged).unwrap();
        merged
    }

    fn entries(&self) -> Vec<PathBuf> {
        let mut entries = listed(&self.path("cache/weights"));
        entries.sort();
        entries
    }
}

fn read_all(source: &dyn TensorSource) -> Vec<Elements> {
    let read = |(name, info): (&str, &crate::checkpoint::TensorInfo)| {
        let mut into = Elements::default();
        source.read(name, 0..info.elements(), &mut into).unwrap();
        into
    };
    source.manifest().iter().map(read).collect()
}

/// Changes one byte of a file.
fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    let at = if at < bytes.len() { at } else { bytes.len() - 1 };
    bytes[at] ^= 1;
    fs::write(path, bytes).unwrap();
}

const RECIPES: [&str; 4] = [
    "members: [a, b, c]",
    "members: [{path: a, coefficient: 2}, b]\ndtype: bfloat16",
    "members: [a, b]\nmethod: slerp\ninit: init",
    "members: [a]\ninit: init\nliti: {eta: 0.5}",
];

#[test]
fn what_was_kept_is_found_again_without_reading_a_member() {
    let bench = Bench::new(WIDE);
    let cache = bench.cache(1 << 30);
    let merged = RECIPES.map(|recipe| bench.keep(&cache, recipe));
    assert_eq!(bench.entries().len(), RECIPES.len());
    let plans = RECIPES.map(|recipe| bench.plan(recipe));
    let slots = plans.each_ref().map(|plan| cache.slot(plan).unwrap());
    let expected = merged.each_ref().map(|merged| read_all(merged.as_ref()));
    for member in ["init", "a", "b", "c"] {
        for shard in ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"] {
            File::options().write(true).open(bench.path(member).join(shard)).unwrap().set_len(0).unwrap();
        }
    }
    for ((slot, merged), expected) in slots.iter().zip(&merged).zip(&expected) {
        let cached = slot.find().unwrap();
        assert_eq!(cached.weights_id(), merged.weights_id().unwrap());
        assert_eq!(cached.member_hashes(), merged.member_hashes().unwrap());
        assert!(&read_all(&cached) == expected);
        cached.verify().unwrap();
    }
}

#[test]
fn what_a_merge_had_to_say_is_kept_with_it() {
    let bench = Bench::new(TINY);
    let cache = bench.cache(1 << 30);
    let recipe = "members: [a, {path: a, name: again}]\nmethod: slerp\ninit: init";
    let merged = bench.keep(&cache, recipe);
    assert_eq!(merged.notes().len(), 1, "the same member twice has no angle");
    assert_eq!(cache.slot(&bench.plan(recipe)).unwrap().find().unwrap().notes(), merged.notes());
}

#[test]
fn other_weights_are_not_found() {
    let bench = Bench::new(TINY);
    let cache = bench.cache(1 << 30);
    bench.keep(&cache, "members: [a, b]");
    let found = |recipe: &str| cache.slot(&bench.plan(recipe)).unwrap().find().is_some();
    assert!(found("members: [a, b]") && found("members: [{path: a, name: x}, b]"));
    for recipe in ["members: [b, a]", "members: [a, b]\ndtype: float16", "members: [a, b, c]", "members: [a, {path: b, coefficient: 2}]"] {
        assert!(!found(recipe), "{recipe}");
    }
}

#[test]
fn a_file_that_changed_in_any_way_is_read_again() {
    let bench = Bench::new(TINY);
    let cache = bench.cache(1 << 30);
    bench.keep(&cache, "members: [a, b]");
    let found = || cache.slot(&bench.plan("members: [a, b]")).unwrap().find().is_some();
    assert!(found());
    let file = bench.path("a/model-00001-of-00002.safetensors");
    let modified = fs::metadata(&file).unwrap().modified().unwrap();
    // In place, in length and in time as before: only what the system keeps for itself tells.
    let last = fs::metadata(&file).unwrap().len() as usize - 1;
    flip(&file, last);
    File::options().write(true).open(&file).unwrap().set_modified(modified).unwrap();
    assert_eq!(found(), !cfg!(unix));
    bench.keep(&cache, "members: [a, b]");
    assert!(found());
    assert_eq!(bench.entries().len(), 2);
}

#[test]
fn an_adapter_is_known_by_its_files_its_base_and_its_numbers() {
    let bench = Bench::new(TINY);
    let cache = bench.cache(1 << 30);
    let tensors = fixture::lora(TINY, "F32", 2, &["self_attn.q_proj"], 7);
    let write = |alpha: f64| {
        let config = serde_json::json!({
            "peft_type": "LORA", "base_model_name_or_path": "../a", "r": 2, "lora_alpha": alpha, "target_modules": ["q_proj"],
            "modules_to_save": ["score"],
        });
        fixture::write_lora(&bench.path("rm"), &config, &tensors).unwrap();
    };
    write(4.0);
    let found = || cache.slot(&bench.plan("members: [rm]")).unwrap().find().map(|cached| read_all(&cached));
    // One adapter is worth keeping: its entry is read instead of base and factors.
    let merged = bench.keep(&cache, "members: [rm]");
    assert!(found() == Some(read_all(merged.as_ref())));
    // The same bytes of weights, and another scale.
    let config = bench.path("rm/adapter_config.json");
    fs::write(&config, fs::read_to_string(&config).unwrap().replace("4.0", "5.0")).unwrap();
    assert!(found().is_none());
    bench.keep(&cache, "members: [rm]");
    assert!(found().is_some());
    for file in ["rm/adapter_model.safetensors", "a/model-00002-of-00002.safetensors"] {
        flip(&bench.path(file), usize::MAX);
        assert!(found().is_none(), "{file}");
        bench.keep(&cache, "members: [rm]");
        assert!(found().is_some(), "{file}");
    }
    assert_eq!(bench.entries().len(), 4);
}

#[test]
fn a_file_that_was_just_written_is_not_trusted_to_stay() {
    let bench = Bench::new(TINY);
    let options = CacheOptions { dir: bench.path("cache"), max_bytes: 1 << 30 };
    // The clock of the test is at the time of the files.
    let clock = Clock::manual();
    clock.advance(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap());
    let cache = Cache::open(&options, clock.clone()).unwrap();
    bench.keep(&cache, "members: [a, b]");
    let found = || cache.slot(&bench.plan("members: [a, b]")).unwrap().find().is_some();
    assert!(!found());
    clock.advance(MINUTE);
    bench.keep(&cache, "members: [a, b]");
    assert!(found(), "it finds the entry that was made before");
    assert_eq!(bench.entries().len(), 1);
}

#[test]
fn a_broken_entry_is_noticed_and_dropped() {
    let bench = Bench::new(WIDE);
    let cache = bench.cache(1 << 30);
    let slot_finds = || cache.slot(&bench.plan("members: [a, b]")).unwrap().find().is_some();
    // What shows at once: the header, the length, what is said about the entry.
    let breakers: [&dyn Fn(&Path); 5] = [
        &|entry| flip(&entry.join("model.safetensors"), 9),
        &|entry| File::options().write(true).open(entry.join("model.safetensors")).unwrap().set_len(1000).unwrap(),
        &|entry| fs::write(entry.join(ENTRY), b"{}").unwrap(),
        &|entry| fs::remove_file(entry.join("model.safetensors")).unwrap(),
        &|entry| flip(&entry.join(ENTRY), 20),
    ];
    for (index, breaker) in breakers.iter().enumerate() {
        bench.keep(&cache, "members: [a, b]");
        breaker(&bench.entries()[0]);
        assert!(!slot_finds(), "{index}");
        assert_eq!(bench.entries().len(), 0, "{index}");
    }
    // What shows when it is read: any bit of any tensor.
    let merged = bench.keep(&cache, "members: [a, b]");
    flip(&bench.entries()[0].join("model.safetensors"), usize::MAX);
    let plan = bench.plan("members: [a, b]");
    let cached = cache.slot(&plan).unwrap().find().unwrap();
    assert!(read_all(&cached) != read_all(merged.as_ref()));
    let problem = cached.verify().unwrap_err();
    assert!(problem.starts_with("checksum: expected "), "{problem}");
    cached.discard(&problem);
    assert_eq!(bench.entries().len(), 0);
    // A hash that was remembered wrongly would name other weights.
    bench.keep(&cache, "members: [a, b]");
    for hash in listed(&bench.path("cache/hashes")) {
        flip(&hash, 5);
    }
    assert!(!slot_finds());
}

#[test]
fn the_least_recently_used_go_when_there_is_no_more_room() {
    let bench = Bench::new(TINY);
    let one = bench.plan("members: [a, b]").merged_bytes();
    let cache = bench.cache(2 * one + one / 2 + 8192);
    let pairs = ["members: [a, b]", "members: [b, c]", "members: [a, c]"];
    let find = |recipe: &str| cache.slot(&bench.plan(recipe)).unwrap().find().is_some();
    for recipe in &pairs[..2] {
        bench.keep(&cache, recipe);
        bench.clock.advance(MINUTE);
    }
    assert!(find(pairs[0]), "this makes it the one that was used last");
    bench.clock.advance(MINUTE);
    bench.keep(&cache, pairs[2]);
    assert_eq!(pairs.map(find), [true, false, true]);
    assert_eq!(fs::read_dir(bench.path("cache/weights")).unwrap().count(), 2, "nothing is left of the one that went");
    let small = bench.cache(one - 1);
    let plan = bench.plan(pairs[1]);
    let merged = Arc::new(Merged::new(plan.clone()).unwrap());
    let error = small.slot(&plan).unwrap().record(&merged).err().unwrap().to_string();
    assert!(error.contains(&format!("have {one} bytes, which the cache's limit of {} bytes", one - 1)), "{error}");
}

#[test]
fn two_that_merge_the_same_at_once_do_not_get_into_each_others_way() {
    let bench = Bench::new(TINY);
    let (ours, theirs) = (bench.cache(1 << 30), bench.cache(1 << 30));
    let plan = bench.plan("members: [a, b]");
    let merged = Arc::new(Merged::new(plan.clone()).unwrap());
    let (ours, theirs) = (ours.slot(&plan).unwrap(), theirs.slot(&plan).unwrap());
    let recorder = ours.record(&merged).unwrap().unwrap();
    assert!(theirs.record(&merged).unwrap().is_none(), "it is being kept already");
    drop(recorder);
    let recorder = theirs.record(&merged).unwrap().expect("the other one has given up");
    // Another cache, on another machine perhaps, has kept it meanwhile.
    bench.keep(&bench.cache(1 << 30), "members: [{path: a, name: x}, b]");
    theirs.keep(recorder, &merged).unwrap();
    assert_eq!(fs::read_dir(bench.path("cache/weights")).unwrap().count(), 1);
    ours.find().unwrap().verify().unwrap();
}

#[test]
fn one_checkpoint_alone_or_one_without_files_is_not_kept() {
    let bench = Bench::new(TINY);
    let cache = bench.cache(1 << 30);
    assert!(cache.slot(&bench.plan("members: [a]")).is_none());
    assert!(cache.slot(&bench.plan("members: [a]\ninit: init")).is_none(), "a linear merge does not read init");

    struct Nowhere(Checkpoint);
    impl TensorSource for Nowhere {
        fn manifest(&self) -> &Manifest {
            self.0.manifest()
        }
        fn read(&self, name: &str, range: Range<usize>, into: &mut Elements) -> Result<(), SourceError> {
            self.0.read(name, range, into)
        }
    }
    let input = |name: &str| {
        let open = || Checkpoint::open(&bench.path(name));
        Ok(Input { weights: Arc::new(Nowhere(open()?)), ..Input::from(open()?) })
    };
    let recipe = Recipe::from_yaml("members: [a, b]", bench.dir.path()).unwrap();
    let plan = MergePlan::new(&recipe, [input("a"), input("b")], None).unwrap();
    assert!(cache.slot(&Arc::new(plan)).is_none());
}

#[test]
fn recipes_within_recipes_are_known_by_their_files() {
    let bench = Bench::new(TINY);
    let cache = bench.cache(1 << 30);
    fs::write(bench.path("inner.yaml"), "members: [a, b]").unwrap();
    let recipe = "members: [inner.yaml, c]";
    bench.keep(&cache, recipe);
    let found = || cache.slot(&bench.plan(recipe)).unwrap().find().is_some();
    assert!(found());
    fs::write(bench.path("inner.yaml"), "members: [{path: a, coefficient: 3}, b]").unwrap();
    assert!(!found());
}

#[test]
fn a_folder_that_cannot_be_made_is_an_error_with_its_name() {
    let bench = Bench::new(TINY);
    fs::write(bench.path("cache"), b"a file").unwrap();
    let options = CacheOptions { dir: bench.path("cache"), max_bytes: 1 };
    let error = Cache::open(&options, bench.clock.clone()).err().unwrap().to_string();
    assert!(error.starts_with(&bench.path("cache/weights").display().to_string()), "{error}");
}
