//! The laws of the house, as tests: layers, the rooms of candle, tonic, unsafe code and the clock, and the size of files.

use std::path::{Path, PathBuf};

/// The layers from left to right; a file names only layers to its left. Layers of one row never see each other.
const LAYERS: [&[&str]; 16] = [
    &["lock"],
    &["clock"],
    &["domain"],
    &["wire"],
    &["client"],
    &["checkpoint"],
    &["merge", "text"],
    &["model"],
    &["scorer"],
    &["registry"],
    &["serve", "offline"],
    &["shutdown", "telemetry"],
    &["config"],
    &["app"],
    &["commands"],
    &["main"],
];

/// The longest file, in lines before its tests.
const MAX_LINES: usize = 400;
/// Lines inside all rooms where unsafe code may live.
const MAX_UNSAFE_LINES: usize = 200;

struct Source {
    path: String,
    layer: String,
    /// The lines before the first test module, without comments.
    code: Vec<String>,
    lines: usize,
    is_test: bool,
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    collect(&root, &mut files);
    files.sort();
    files.iter().map(|file| source(&root, file)).collect()
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("a readable folder") {
        let path = entry.expect("a readable entry").path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

fn source(root: &Path, file: &Path) -> Source {
    let text = std::fs::read_to_string(file).expect("readable source");
    let path = file.strip_prefix(root).expect("inside src").to_string_lossy().replace('\\', "/");
    let layer = path.split('/').next().unwrap_or_default().trim_end_matches(".rs").to_owned();
    let before_tests: Vec<&str> = text.lines().take_while(|line| !line.starts_with("#[cfg(test)]")).collect();
    let code = before_tests.iter().map(|line| line.split("//").next().unwrap_or_default().to_owned()).collect();
    let is_test = path.ends_with("tests.rs") || path.contains("/tests/") || path.ends_with("fixture.rs");
    Source { layer, code, lines: before_tests.len(), is_test, path }
}

fn rank(layer: &str) -> usize {
    LAYERS.iter().position(|row| row.contains(&layer)).unwrap_or_else(|| panic!("src/{layer} stands in no layer of tests/tidy.rs"))
}

/// The names that follow `crate::` in a line.
fn named_layers(line: &str) -> impl Iterator<Item = &str> {
    line.match_indices("crate::").map(|(at, prefix)| {
        let rest = &line[at + prefix.len()..];
        rest.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default()
    })
}

fn check(rule: impl Fn(&Source) -> Vec<String>) {
    let broken: Vec<String> = sources()
        .iter()
        .filter(|source| source.layer != "lib")
        .flat_map(|source| rule(source).into_iter().map(|what| format!("src/{}: {what}", source.path)))
        .collect();
    assert!(broken.is_empty(), "\n{}", broken.join("\n"));
}

#[test]
fn a_layer_names_only_layers_to_its_left() {
    check(|source| {
        let own = rank(&source.layer);
        let mut broken = Vec::new();
        for line in &source.code {
            for named in named_layers(line).filter(|named| !named.is_empty() && *named != source.layer) {
                if rank(named) >= own {
                    broken.push(format!("names crate::{named}: {}", line.trim()));
                }
            }
        }
        broken
    });
}

#[test]
fn candle_and_tonic_and_the_clock_stay_in_their_rooms() {
    let rooms: [(&str, &[&str]); 5] = [
        ("candle_", &["model"]),
        ("tonic::", &["wire", "client", "serve"]),
        ("axum::", &["serve"]),
        ("Instant::now", &["clock"]),
        ("SystemTime::now", &["clock"]),
    ];
    check(|source| {
        // Tests may talk to a server, and start their own time anywhere.
        if source.is_test {
            return Vec::new();
        }
        let strangers = rooms.iter().filter(|(_, layers)| !layers.contains(&source.layer.as_str()));
        strangers
            .flat_map(|(word, layers)| {
                source
                    .code
                    .iter()
                    .filter(move |line| line.contains(word))
                    .map(move |line| format!("{word} belongs to {}: {}", layers.join(", "), line.trim()))
            })
            .collect()
    });
}

#[test]
fn unsafe_code_lives_only_in_its_small_rooms() {
    let mut inside = 0;
    for source in sources() {
        let lifted = source.code.iter().any(|line| line.contains("allow(unsafe_code)"));
        let room = source.path.starts_with("model/kernels/") || source.path.starts_with("model/device/");
        assert!(!lifted || room, "src/{}: unsafe code outside its rooms", source.path);
        if lifted {
            inside += source.lines;
        }
    }
    assert!(inside <= MAX_UNSAFE_LINES, "{inside} lines in files that allow unsafe code, at most {MAX_UNSAFE_LINES}");
}

#[test]
fn files_are_small() {
    check(|source| {
        if source.is_test || source.lines <= MAX_LINES {
            Vec::new()
        } else {
            vec![format!("{} lines before its tests, at most {MAX_LINES}", source.lines)]
        }
    });
}

#[test]
fn no_test_sleeps_or_is_skipped_and_nothing_is_left_undone() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    collect(&root.join("src"), &mut files);
    collect(&root.join("tests"), &mut files);
    // Spelled in two parts, so that this list does not find itself.
    let words =
        [["#[ig", "nore"], ["thread::sl", "eep"], ["tod", "o!("], ["unimpl", "emented!("], ["db", "g!("]].map(|parts| parts.concat());
    for file in files {
        let text = std::fs::read_to_string(&file).expect("readable source");
        for word in &words {
            assert!(!text.contains(word.as_str()), "{}: {word}", file.display());
        }
    }
}
