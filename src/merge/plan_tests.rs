use super::*;
use crate::checkpoint::TensorInfo;
use crate::checkpoint::fixture::{self, TINY, Tensors};

/// Members `a`, `b`, ... in folders of their own.
struct Family {
    dir: tempfile::TempDir,
    names: Vec<&'static str>,
}

impl Family {
    fn new(count: usize) -> Self {
        let names = ["a", "b", "c", "d"][..count].to_vec();
        let family = Self { dir: tempfile::tempdir().unwrap(), names };
        for name in &family.names {
            family.write(name, &fixture::config(TINY), &family.tensors("F32"));
        }
        family
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn tensors(&self, dtype: &'static str) -> Tensors {
        fixture::llama(TINY, dtype, 1)
    }

    fn write(&self, name: &str, config: &Value, tensors: &Tensors) {
        let _ = std::fs::remove_dir_all(self.path(name));
        fixture::write(&self.path(name), config, tensors, 1).unwrap();
    }

    fn plan(&self, more: &str) -> Result<MergePlan, MergeError> {
        let text = format!("members: {:?}\n{more}", self.names);
        MergePlan::open(&Recipe::from_yaml(&text, self.dir.path()).unwrap())
    }

    fn problems(&self, more: &str) -> Vec<String> {
        self.plan(more).unwrap_err().problems
    }
}

#[test]
fn a_plan_says_what_will_be_read_and_made() {
    let family = Family::new(3);
    family.write("b", &fixture::config(TINY), &family.tensors("BF16"));
    let plan = family.plan("dtype: bfloat16\ninit: a").unwrap();
    // Counted by hand: embedding 24*8, norm and head 8 each, and two layers of 4*8*8 + 3*16*8 + 2*8.
    let parameters = 24 * 8 + 8 + 8 + 2 * (4 * 64 + 3 * 128 + 16);
    assert_eq!(plan.parameters(), parameters);
    assert_eq!(plan.bytes_to_read(), parameters * (4 + 2 + 4));
    assert_eq!(plan.merged_bytes(), parameters * 2);
    assert_eq!(plan.manifest().get("score.weight").unwrap().to_string(), "BF16 [1, 8]");
    let text = plan.to_string();
    for part in [
        "linear merge of 3 members to bfloat16",
        "  b     0.333333     3.0 kB  BF16  ",
        "21 tensors, 1520 parameters: 15.2 kB to read, 3.0 kB merged",
        "note: members are stored in F32 and BF16; they are averaged in float64",
        "note: init is checked but not read",
    ] {
        assert!(text.contains(part), "{text:?} should say {part:?}");
    }
}

#[test]
fn every_incompatibility_is_told_at_once() {
    let family = Family::new(4);
    std::fs::remove_file(family.path("a").join("model.safetensors")).unwrap();
    std::fs::remove_dir_all(family.path("c")).unwrap();
    let mut other = fixture::tokenizer();
    other["model"]["vocab"]["a"] = 23.into();
    other["model"]["vocab"]["t"] = 4.into();
    std::fs::write(family.path("d").join("tokenizer.json"), other.to_string()).unwrap();
    let problems = family.problems("init: nowhere");
    assert_eq!(problems.len(), 4, "{problems:?}");
    assert!(problems[0].starts_with("member \"a\": ") && problems[0].contains("has no weights"), "{problems:?}");
    assert!(problems[1].starts_with("member \"c\": ") && problems[1].contains("there is no such folder"), "{problems:?}");
    assert!(problems[2].starts_with("init: ") && problems[2].contains("there is no such folder"), "{problems:?}");
    assert!(problems[3].starts_with("member \"d\" differs from member \"b\": ") && problems[3].contains("tokenizer"), "{problems:?}");
    let text = MergeError { problems }.to_string();
    assert!(text.starts_with("cannot merge, for 4 reasons:\n  - member \"a\""), "{text}");
}

#[test]
fn one_incompatibility_is_one_sentence() {
    let family = Family::new(1);
    std::fs::remove_dir_all(family.path("a")).unwrap();
    let expected = format!("cannot merge: member \"a\": {}: there is no such folder", family.path("a").display());
    assert_eq!(family.plan("").unwrap_err().to_string(), expected);
}

#[test]
fn a_member_without_its_head_is_refused() {
    let family = Family::new(2);
    let mut tensors = family.tensors("F32");
    tensors.remove("score.weight");
    family.write("b", &fixture::config(TINY), &tensors);
    let problems = family.problems("");
    assert_eq!(problems.len(), 1, "{problems:?}");
    assert!(problems[0].starts_with("member \"b\": ") && problems[0].contains("score.weight"), "{problems:?}");
}

#[test]
fn a_tensor_of_another_shape_is_refused() {
    let family = Family::new(2);
    let mut tensors = family.tensors("F32");
    tensors.insert("score.weight".to_owned(), fixture::tensor("F32", &[2, 8], fixture::noise(1).take(16)));
    let mut config = fixture::config(TINY);
    config["id2label"] = serde_json::json!({"0": "A", "1": "B"});
    family.write("b", &config, &tensors);
    let problems = family.problems("");
    assert!(problems.iter().all(|problem| problem.starts_with("member \"b\"")), "{problems:?}");
    let expected = "member \"b\": tensor \"score.weight\" has shape [2, 8], expected [1, 8] as in member \"a\"";
    assert!(problems.iter().any(|problem| problem == expected), "{problems:?}");
}

#[test]
fn integers_are_not_averaged() {
    let family = Family::new(2);
    let mut tensors = family.tensors("F32");
    let integers = fixture::Tensor { dtype: "I32", shape: vec![1, 8], bytes: vec![0; 32] };
    tensors.insert("score.weight".to_owned(), integers);
    family.write("b", &fixture::config(TINY), &tensors);
    let problems = family.problems("");
    assert_eq!(problems, ["member \"b\": tensor \"score.weight\" is I32, expected floating-point numbers to average"]);
}

#[test]
fn an_initialisation_may_lack_the_head_but_not_be_another_model() {
    let family = Family::new(2);
    family.write("init", &fixture::config(TINY), &family.tensors("F32"));
    let checkpoint = |name: &str| Checkpoint::open(&family.path(name)).map(Input::from);
    let recipe = Recipe::from_yaml("members: [a, b]\ninit: init", family.dir.path()).unwrap();
    let with_init = |names: &[&str], shape: Option<Vec<usize>>| {
        let mut input = checkpoint("init").unwrap();
        let keep = input.weights.manifest().iter().filter(|(name, _)| !names.contains(name));
        let change = |(name, info): (&str, &TensorInfo)| {
            let mut info = info.clone();
            if let Some(shape) = shape.clone().filter(|_| name == "model.norm.weight") {
                info.shape = shape;
            }
            (name.to_owned(), info)
        };
        let manifest: Manifest = keep.map(change).collect();
        input.weights = Arc::new(Headers(manifest));
        MergePlan::new(&recipe, [checkpoint("a"), checkpoint("b")], Some(Ok(input)))
    };
    let plan = with_init(&["score.weight"], None).unwrap();
    assert!(plan.notes().contains(&"init lacks 1 tensors of the members: score.weight".to_owned()), "{:?}", plan.notes());
    let problems = with_init(&[], Some(vec![4, 2])).unwrap_err().problems;
    assert_eq!(problems, ["init: tensor \"model.norm.weight\" has shape [4, 2], expected [8] as in member \"a\""]);
}

/// A source without weights: planning reads none.
struct Headers(Manifest);

impl TensorSource for Headers {
    fn manifest(&self) -> &Manifest {
        &self.0
    }

    fn read(
        &self,
        name: &str,
        _: std::ops::Range<usize>,
        _: &mut crate::checkpoint::Elements,
    ) -> Result<(), crate::checkpoint::SourceError> {
        panic!("a plan must not read {name}")
    }
}

#[test]
fn a_plan_needs_headers_alone() {
    let family = Family::new(2);
    let recipe = Recipe::from_yaml("members: [a, b]", family.dir.path()).unwrap();
    let input = |name: &&str| {
        let mut input = Input::from(Checkpoint::open(&family.path(name))?);
        input.weights = Arc::new(Headers(input.weights.manifest().clone()));
        Ok(input)
    };
    assert_eq!(MergePlan::new(&recipe, family.names.iter().map(input), None).unwrap().members().len(), 2);
    let one = MergePlan::new(&recipe, family.names.iter().take(1).map(input), None).unwrap_err();
    assert_eq!(one.problems, ["member \"b\": no checkpoint was given for it"]);
}

#[test]
fn extrapolation_is_noted() {
    let family = Family::new(2);
    let recipe = Recipe::from_yaml("members: [{path: a, coefficient: 1.5}, {path: b, coefficient: -0.5}]", family.dir.path()).unwrap();
    let notes = MergePlan::open(&recipe).unwrap().notes().to_vec();
    assert_eq!(notes, ["a coefficient is negative: the result lies outside of the members (extrapolation)"]);
}
