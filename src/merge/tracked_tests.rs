use std::cell::Cell;

use serde_json::json;

use super::*;
use crate::checkpoint::Folder;
use crate::checkpoint::fixture::{self, Size, TINY, Tensors};
use crate::merge::content::BLOCK_ELEMENTS;
use crate::merge::{MergeError, MergePlan, Merged, Recipe, Report};

/// Four blocks in the embedding, and columns that do not fill panels of eight.
const WIDE: Size = Size { hidden: 68, intermediate: 24, layers: 2, vocab: 3000 };
const EMBEDDING: &str = "model.embed_tokens.weight";
const QUERY: &str = "model.layers.1.self_attn.q_proj.weight";

/// `base`, a language model, and what stands on it.
struct Family(tempfile::TempDir);

impl Family {
    fn new(size: Size) -> Self {
        let family = Self(tempfile::tempdir().unwrap());
        let mut base = fixture::llama(size, "BF16", 1);
        base.remove("score.weight");
        family.write_base("base", size, &base, 2);
        family
    }

    fn write_base(&self, name: &str, size: Size, tensors: &Tensors, shards: usize) {
        fixture::write(&self.path(name), &fixture::config(size), tensors, shards).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn adapter(&self, name: &str, base: &str, alpha: f64, tensors: &Tensors) {
        let config = json!({
            "peft_type": "LORA", "base_model_name_or_path": format!("../{base}"), "r": 3, "lora_alpha": alpha,
            "target_modules": ["q_proj", "down_proj"], "modules_to_save": ["score"],
        });
        fixture::write_lora(&self.path(name), &config, tensors).unwrap();
    }

    fn plan(&self, recipe: &str) -> Result<Arc<MergePlan>, MergeError> {
        MergePlan::open(&Recipe::from_yaml(recipe, self.0.path()).unwrap()).map(Arc::new)
    }

    fn merged(&self, recipe: &str) -> Merged {
        Merged::new(self.plan(recipe).unwrap()).unwrap()
    }

    fn source(&self, name: &str) -> Arc<dyn TensorSource> {
        Folder::open(&self.path(name), None).unwrap().weights
    }

    fn numbers(&self, member: &str, tensor: &str) -> Vec<f64> {
        numbers(&*self.source(member), tensor)
    }
}

fn lora(size: Size, dtype: &'static str, rank: usize, seed: u64) -> Tensors {
    fixture::lora(size, dtype, rank, &["self_attn.q_proj", "mlp.down_proj"], seed)
}

fn numbers(source: &dyn TensorSource, tensor: &str) -> Vec<f64> {
    let mut elements = Elements::default();
    source.read(tensor, 0..source.manifest().get(tensor).unwrap().elements(), &mut elements).unwrap();
    let mut wide = vec![0.0; elements.len()];
    elements.widen(0..elements.len(), &mut wide);
    wide
}

/// A source that counts how many elements are read of it.
struct Counted(Arc<dyn TensorSource>, AtomicUsize);

impl TensorSource for Counted {
    fn manifest(&self) -> &Manifest {
        self.0.manifest()
    }

    fn read(&self, name: &str, range: Range<usize>, into: &mut Elements) -> Result<(), SourceError> {
        let count = range.len();
        let outcome = self.0.read(name, range, into);
        self.1.fetch_add(count, Ordering::Relaxed);
        outcome
    }

    fn files(&self) -> Option<Vec<FileStamp>> {
        self.0.files()
    }
}

#[test]
fn adapters_of_one_base_read_it_once() {
    let family = Family::new(WIDE);
    let mut places = Places::default();
    let mut counts = Vec::new();
    let tracked: Vec<Tracked> = (0..4)
        .map(|seed| {
            let name = format!("rm-{seed}");
            family.adapter(&name, "base", 6.0, &lora(WIDE, "F32", 3, seed));
            let source = family.source(&name);
            let adapter = source.adapter().unwrap();
            let base = Arc::new(Counted(Arc::clone(adapter.base()), AtomicUsize::new(0)));
            counts.push(Arc::clone(&base));
            let source: Arc<dyn TensorSource> = Arc::new(adapter.through(base, Arc::clone(adapter.stored())));
            places.track(&source, &family.path(&name))
        })
        .collect();
    let mut elements = Elements::default();
    for (tensor, count) in [(EMBEDDING, 3000 * 68), (QUERY, 68 * 68)] {
        for begin in (0..count).step_by(BLOCK_ELEMENTS) {
            for member in &tracked {
                member.read(tensor, begin..count.min(begin + BLOCK_ELEMENTS), &mut elements).unwrap();
            }
        }
    }
    let read = |count: &Arc<Counted>| count.1.load(Ordering::Relaxed);
    assert_eq!(counts.iter().map(read).sum::<usize>(), 3000 * 68 + 68 * 68);
    // Hashes were taken meanwhile.
    let names = [EMBEDDING.to_owned(), QUERY.to_owned()];
    let hashes: BTreeSet<_> = tracked.iter().map(|member| member.content_hash(&names).unwrap()).collect();
    assert_eq!(hashes.len(), 4);
    assert_eq!(counts.iter().map(read).sum::<usize>(), 3000 * 68 + 68 * 68);
}

#[test]
fn a_mixed_merge_is_the_float64_mean_of_base_plus_product_rounded_once() {
    let family = Family::new(WIDE);
    family.write_base("full", WIDE, &fixture::llama(WIDE, "F16", 5), 1);
    for seed in 0..2 {
        family.adapter(&format!("rm-{seed}"), "base", 6.0, &lora(WIDE, ["F32", "BF16"][seed], 3, seed as u64));
    }
    let recipe = "members: [{path: rm-0, coefficient: 1}, {path: full, coefficient: 2}, {path: rm-1, coefficient: 5}]";
    let merged = family.merged(recipe);
    let shapes: Vec<(String, usize)> = merged.manifest().iter().map(|(name, info)| (name.to_owned(), info.elements())).collect();
    for (name, count) in &shapes {
        let members = ["rm-0", "full", "rm-1"].map(|member| family.numbers(member, name));
        let mut elements = Elements::default();
        merged.read(name, 0..*count, &mut elements).unwrap();
        let Elements::F32(found) = elements else { panic!("{elements:?}") };
        for (index, found) in found.iter().enumerate() {
            let mean = members[0][index] * 0.125 + members[1][index] * 0.25 + members[2][index] * 0.625;
            assert_eq!(found.to_bits(), (mean as f32).to_bits(), "{name} {index}");
        }
    }
    // The product of averaged factors would be another matrix.
    let of = |seed: u64| lora(WIDE, "F32", 3, seed);
    let (first, second) = (of(0), of(1));
    let mean: Tensors = first
        .iter()
        .map(|(name, tensor)| {
            let values = |tensor: &fixture::Tensor| {
                tensor.bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect::<Vec<_>>()
            };
            let mean = values(tensor).into_iter().zip(values(&second[name])).map(|(a, b)| (a + b) / 2.0).collect::<Vec<_>>();
            (name.clone(), fixture::tensor("F32", &tensor.shape, mean.into_iter()))
        })
        .collect();
    family.adapter("averaged-factors", "base", 6.0, &mean);
    family.adapter("rm-1", "base", 6.0, &second);
    let (averaged, merged) = (family.numbers("averaged-factors", QUERY), numbers(&family.merged("members: [rm-0, rm-1]"), QUERY));
    assert!(averaged.iter().zip(&merged).any(|(a, b)| (a - b).abs() > 1e-3));
}

#[test]
fn threads_and_chunks_change_no_bit_of_adapters_either() {
    let family = Family::new(WIDE);
    for seed in 0..3 {
        family.adapter(&format!("rm-{seed}"), "base", 6.0, &lora(WIDE, "BF16", 3, seed));
    }
    let read = |threads: usize, chunk: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let merged = family.merged("members: [rm-0, rm-1, rm-2]\ndtype: bfloat16");
            let mut bytes = Vec::new();
            for (name, info) in merged.manifest().iter() {
                for begin in (0..info.elements()).step_by(chunk) {
                    let mut elements = Elements::default();
                    merged.read(name, begin..info.elements().min(begin + chunk), &mut elements).unwrap();
                    bytes.extend_from_slice(elements.bytes());
                }
            }
            (bytes, merged.weights_id().unwrap())
        })
    };
    let one = read(1, usize::MAX >> 1);
    for (threads, chunk) in [(2, usize::MAX >> 1), (5, 150_000), (1, 999)] {
        assert!(read(threads, chunk) == one, "{threads} threads, chunks of {chunk}");
    }
}

#[test]
fn the_id_names_what_is_stored_and_how_it_is_joined() {
    let family = Family::new(TINY);
    let tensors = lora(TINY, "F32", 3, 1);
    family.adapter("rm", "base", 6.0, &tensors);
    let id = |members: &str| family.merged(&format!("members: [{members}]")).weights_id().unwrap();
    let first = id("rm");
    // The same under other names, in other files, on a base that was saved without a prefix and in one piece.
    let raw = tensors.iter().map(|(name, tensor)| {
        (name.replace(".weight", ".default.weight").replace("score.default", "score.modules_to_save.default"), tensor.clone())
    });
    family.adapter("raw", "base", 6.0, &raw.collect());
    let mut base = fixture::llama(TINY, "BF16", 1);
    base.remove("score.weight");
    let bare: Tensors = base.iter().map(|(name, tensor)| (name.replace("model.", ""), tensor.clone())).collect();
    family.write_base("bare", TINY, &bare, 1);
    family.adapter("on-bare", "bare", 6.0, &tensors);
    for same in ["raw", "on-bare", "{path: rm, base: bare, name: x}"] {
        assert_eq!(id(same), first, "{same}");
    }
    // Another scale, another number in the adapter, another in the base.
    family.adapter("scaled", "base", 5.0, &tensors);
    let mut changed = tensors.clone();
    changed.iter_mut().find(|(name, _)| name.contains("lora_B")).unwrap().1.bytes[2] ^= 1;
    family.adapter("changed", "base", 6.0, &changed);
    base.get_mut("model.norm.weight").unwrap().bytes[0] ^= 1;
    family.write_base("other", TINY, &base, 1);
    let others = [first, id("scaled"), id("changed"), id("{path: rm, base: other}")];
    assert_eq!(others.iter().map(|id| id.0).collect::<BTreeSet<_>>().len(), 4);
    // An adapter stands beside the full checkpoint that it is: equal numbers, but another input.
    let merged = family.merged("members: [rm]");
    let full = merged.manifest().iter().map(|(name, info)| {
        (
            name.to_owned(),
            fixture::tensor("F32", &info.shape, numbers(&merged, name).iter().map(|&x| x as f32).collect::<Vec<_>>().into_iter()),
        )
    });
    family.write_base("full", TINY, &full.collect(), 1);
    assert_ne!(id("full"), first);
}

thread_local! {
    static READS: Cell<bool> = const { Cell::new(false) };
}

/// A thread that holds the factors' lock and waits for others of its pool may be handed a block that needs that lock.
#[test]
fn whoever_reads_factors_is_handed_no_other_work_meanwhile() {
    let size = Size { hidden: 4, intermediate: 400_000, layers: 1, vocab: 24 };
    let family = Family::new(size);
    family.adapter("rm", "base", 6.0, &lora(size, "BF16", 3, 1));
    let source = family.source("rm");
    let adapter = source.adapter().unwrap();
    let (pool, handed) = (rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap(), Arc::new(AtomicUsize::new(0)));
    for _ in 0..20 {
        let stored = Arc::new(Counted(Arc::clone(adapter.stored()), AtomicUsize::new(0)));
        let through = adapter.through(Arc::clone(adapter.base()), Arc::clone(&stored) as Arc<dyn TensorSource>);
        let tracked = Places::default().track(&(Arc::new(through) as Arc<dyn TensorSource>), &family.path("rm"));
        // One of two threads is busy until the other has read, and only hashes; then there is much else to do for the idle.
        pool.spawn(move || {
            while stored.1.load(Ordering::Relaxed) < 400_000 {
                std::hint::spin_loop();
            }
        });
        pool.install(|| {
            let spawn = || {
                for _ in 0..1000 {
                    let handed = Arc::clone(&handed);
                    pool.spawn(move || _ = handed.fetch_add(usize::from(READS.get()), Ordering::Relaxed));
                }
            };
            std::thread::scope(|scope| scope.spawn(spawn).join().unwrap());
            READS.set(true);
            tracked.read("model.layers.0.mlp.down_proj.weight", 0..BLOCK_ELEMENTS, &mut Elements::default()).unwrap();
            READS.set(false);
        });
    }
    assert_eq!(handed.load(Ordering::Relaxed), 0);
}

#[test]
fn adapters_are_reported_on_as_the_full_checkpoints_that_they_are() {
    let family = Family::new(WIDE);
    for seed in 0..2 {
        let name = format!("rm-{seed}");
        family.adapter(&name, "base", 6.0, &lora(WIDE, "F32", 3, seed));
        let source = family.source(&name);
        let wide = |(tensor, info): (&str, &TensorInfo)| {
            let bytes = numbers(&*source, tensor).iter().flat_map(|x| x.to_le_bytes()).collect();
            (tensor.to_owned(), fixture::Tensor { dtype: "F64", shape: info.shape.clone(), bytes })
        };
        family.write_base(&format!("full/rm-{seed}"), WIDE, &source.manifest().iter().map(wide).collect(), 1);
    }
    let report = |folder: &str, init: &str| {
        let members = format!("members: [{folder}rm-0, {folder}rm-1]\n{init}");
        let report = Report::new(&family.plan(&members).unwrap(), &mut |_, _| {}).unwrap();
        let mut json = serde_json::to_value(report).unwrap();
        // What lies in the files is told as it is stored.
        let dtypes = json["members"].as_array_mut().unwrap().iter_mut().map(|member| member["dtypes"].take()).collect::<Vec<_>>();
        (json, dtypes)
    };
    let rule = "init: base\nmethod: slerp\nrules: [{match: score.*, coefficients: {rm-0: 1, rm-1: 1}}]";
    for init in ["", rule] {
        let (adapters, full) = (report("", init), report("full/", init));
        assert_eq!(adapters.0, full.0);
        assert_ne!(adapters.1, full.1);
    }
}

#[test]
fn one_backbone_under_two_prefixes_is_one_backbone() {
    let family = Family::new(TINY);
    let (tensors, other) = (fixture::llama(TINY, "F32", 3), fixture::llama(TINY, "F32", 4));
    let named = |change: fn(&str) -> String| other.iter().map(|(name, tensor)| (change(name), tensor.clone())).collect::<Tensors>();
    family.write_base("a", TINY, &tensors, 1);
    family.write_base("b", TINY, &other, 1);
    family.write_base("bare/b", TINY, &named(|name| name.replace("model.", "")), 2);
    family.write_base("wrapped/b", TINY, &named(|name| format!("module.{name}")), 1);
    let id = |members: &str| family.merged(&format!("members: [{members}]")).weights_id().unwrap();
    let expected = id("a, b");
    assert_eq!([id("a, bare/b"), id("a, wrapped/b")], [expected; 2]);
    let merged = family.merged("members: [bare/b, a]");
    assert!(merged.manifest().get("model.norm.weight").is_some() && merged.manifest().len() == tensors.len());
}

#[test]
fn a_plan_tells_the_memory_that_factors_take() {
    let family = Family::new(TINY);
    for seed in 0..2 {
        family.adapter(&format!("rm-{seed}"), "base", 6.0, &lora(TINY, "BF16", 3, seed));
    }
    let [one, two, base] = ["rm-0", "rm-0, rm-1", "base"].map(|members| {
        let rules = if members == "base" { "kind: policy" } else { "" };
        family.plan(&format!("members: [{members}]\n{rules}")).unwrap().read_buffer_bytes(2)
    });
    // Two tensors of 8 by 16: B as it is stored, A in panels of float64, and one A besides while it is prepared.
    let (left, right, panels) = (2 * 8 * 3, 2 * 3 * 16, 8 * 3 * 16);
    let block = 2 * BLOCK_ELEMENTS as u64;
    let adapter = 2 * (left + panels) + right + panels + 2 * block;
    assert_eq!(one - base, adapter);
    // A base of two is kept for the second, two blocks for each thread.
    assert_eq!(two - base, 2 * adapter + 4 * block);
}

#[test]
fn a_plan_counts_a_shared_base_once_and_tells_what_is_stored() {
    let family = Family::new(TINY);
    for seed in 0..3 {
        family.adapter(&format!("rm-{seed}"), "base", 6.0, &lora(TINY, "F32", 3, seed));
    }
    let plan = family.plan("members: [rm-0, rm-1, rm-2]").unwrap();
    let dtypes: Vec<_> = plan.members().iter().map(|member| member.source().dtypes().iter().copied().collect::<Vec<_>>()).collect();
    assert_eq!(dtypes, vec![vec![Dtype::F32, Dtype::Bf16]; 3]);
    // Factors of two layers, 3 by 8 and 8 by 3, 3 by 16 and 8 by 3; a head of 8; the base without a head.
    let adapter = 4 * (2 * (24 + 24 + 48 + 24) + 8);
    let base = 2 * (24 * 8 + 8 + 2 * (4 * 64 + 3 * 128 + 16));
    assert_eq!(plan.members().iter().map(|member| member.source().bytes()).collect::<Vec<_>>(), [base + adapter, adapter, adapter]);
    assert_eq!(plan.bytes_to_read(), base + 3 * adapter);
    let line = format!("{} on {}\n", family.path("rm-2").display(), std::fs::canonicalize(family.path("base")).unwrap().display());
    assert!(plan.to_string().contains(&line), "{plan}");
    let notes = ["members are stored in F32 and BF16; they are averaged in float64"];
    assert_eq!(plan.notes(), notes);
    assert_eq!(plan.config()["architectures"], json!(["LlamaForSequenceClassification"]));
}

#[test]
fn what_adapters_have_lost_is_told_by_the_plan() {
    let family = Family::new(TINY);
    let mut headless = lora(TINY, "F32", 3, 1);
    headless.remove("base_model.model.score.weight");
    family.adapter("rm", "base", 6.0, &lora(TINY, "F32", 3, 0));
    family.adapter("headless", "base", 6.0, &headless);
    let problems = family.plan("members: [rm, headless]").unwrap_err().problems;
    let base = family.path("headless").join("../base");
    let expected = format!(
        "member \"headless\": the adapter was saved without its reward head, and its base {} has none, so there is nothing to score with; \
         train and save it with modules_to_save: [\"score\"] (a missing head is never initialised at random)",
        base.display()
    );
    assert_eq!(problems, [expected]);
    // Not where another's head is taken, or none is asked for.
    family.plan("members: [rm, headless]\nrules: [{match: score.*, from: rm}]").unwrap();
    family.plan("kind: policy\nmembers: [headless]").unwrap();
    // On a reward model, the base's head is used, which is noted.
    family.write_base("rewarding", TINY, &fixture::llama(TINY, "BF16", 3), 1);
    let plan = family.plan("members: [rm, {path: headless, base: rewarding}]").unwrap();
    let note = format!(
        "member \"headless\": the adapter was saved without a reward head; that of its base {} is used (score.weight)",
        family.path("rewarding").display()
    );
    assert!(plan.notes().contains(&note), "{:?}", plan.notes());
    let refused = family.plan("members: [rm, {path: rm, base: nowhere, name: x}]").unwrap_err().problems;
    assert_eq!(refused, [format!("member \"x\": {}: there is no such folder", family.path("nowhere").display())]);
}

#[test]
fn task_vectors_of_adapters_turn_around_their_base() {
    let family = Family::new(TINY);
    for seed in 0..2 {
        family.adapter(&format!("rm-{seed}"), "base", 6.0, &lora(TINY, "F32", 3, seed));
    }
    let recipe = "method: slerp\ninit: base\nmembers: [rm-0, rm-1]\nrules: [{match: score.*, coefficients: {rm-0: 1, rm-1: 1}}]";
    let merged = family.merged(recipe);
    let [a, b] = ["rm-0", "rm-1"].map(|member| family.numbers(member, QUERY));
    let init = family.numbers("base", QUERY);
    // In this layer two matrices have task vectors.
    let down = "model.layers.1.mlp.down_proj.weight";
    let [c, d] = ["rm-0", "rm-1"].map(|member| family.numbers(member, down));
    let other = family.numbers("base", down);
    let vector = |x: &[f64], y: &[f64]| -> Vec<f64> {
        x.iter().zip(&init).chain(y.iter().zip(&other)).map(|(member, init)| member - init).collect()
    };
    let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
    let (x, y) = (vector(&a, &c), vector(&b, &d));
    let angle = (dot(&x, &y) / (dot(&x, &x) * dot(&y, &y)).sqrt()).acos();
    let share = (0.5 * angle).sin() / angle.sin();
    for (index, found) in numbers(&merged, QUERY).iter().enumerate() {
        let expected = init[index] + share * ((a[index] - init[index]) + (b[index] - init[index]));
        assert!((found - expected).abs() < 1e-6, "{index}: {found} {expected}");
    }
    // Init lies in the folder that the adapters stand on, and costs nothing.
    assert_eq!(merged.plan().init().unwrap().bytes(), 0);
}
