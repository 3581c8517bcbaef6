//! The image: what it needs to be built is there, and what it runs as is harmless.

use warm::config::{Resolved, Sources};

use super::*;

/// The lines of a stage, comments and continuations resolved.
fn stage(name: &str) -> Vec<String> {
    let text = read("Dockerfile").replace("\\\n", " ");
    let mut inside = false;
    let mut lines = Vec::new();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        if line.starts_with("FROM ") {
            inside = line.ends_with(&format!(" AS {name}"));
        }
        if inside {
            lines.push(line.split_whitespace().collect::<Vec<_>>().join(" "));
        }
    }
    assert!(!lines.is_empty(), "no stage {name}");
    lines
}

#[test]
fn what_runs_has_no_rights_no_shell_and_checks_itself() {
    let config = Resolved::new(Sources::default()).expect("defaults").config;
    for name in ["cpu", "cuda"] {
        let lines = stage(name);
        assert!(!lines.iter().any(|line| line.starts_with("RUN")), "{name}: a shell would be needed");
        assert!(lines.contains(&"USER 65532:65532".to_owned()), "{name}");
        assert!(lines.contains(&"ENTRYPOINT [\"/usr/local/bin/warm\"]".to_owned()), "{name}");
        assert!(lines.contains(&format!("EXPOSE {} {}", config.listen.port(), config.admin_listen.port())), "{name}");
        let health = lines.iter().find(|line| line.starts_with("HEALTHCHECK")).expect("a health check");
        assert!(
            health.contains("CMD [\"/usr/local/bin/warm\", \"health\"") && health.contains(&config.listen.port().to_string()),
            "{health}"
        );
    }
}

#[test]
fn the_build_copies_all_that_it_reads_and_nothing_of_it_is_ignored() {
    let ignored = read("Dockerfile.dockerignore");
    let allowed: Vec<&str> = ignored.lines().filter_map(|line| line.strip_prefix('!')).collect();
    for name in ["cpu-build", "cuda-build"] {
        let lines = stage(name);
        let copied: Vec<String> = lines
            .iter()
            .filter_map(|line| line.strip_prefix("COPY "))
            .filter(|rest| !rest.starts_with("--from"))
            .flat_map(|rest| {
                let words: Vec<&str> = rest.split(' ').collect();
                words[..words.len() - 1].iter().map(|word| (*word).to_owned()).collect::<Vec<_>>()
            })
            .collect();
        for path in &copied {
            assert!(root().join(path).exists(), "{name}: {path}");
            assert!(allowed.contains(&path.as_str()), "{name}: {path} is ignored");
        }
        // The manifest names the benches, the build script the contract.
        for path in ["Cargo.toml", "Cargo.lock", "build.rs", "proto", "benches", "src"] {
            assert!(copied.iter().any(|copy| copy == path), "{name}: {path} is not copied");
        }
        // Dependencies are built before our own code is there.
        let build = lines.iter().position(|line| line.contains("cargo build")).expect("a build");
        let source = lines.iter().position(|line| line == "COPY src src").expect("the source");
        assert!(build < source, "{name}");
        assert!(lines.iter().filter(|line| line.contains("cargo build")).all(|line| line.contains("--locked")), "{name}");
    }
}

#[test]
fn compose_gives_the_server_time_to_drain() {
    let compose = document("compose.yaml");
    let config = Resolved::new(Sources::default()).expect("defaults").config;
    let grace = text(&compose, "services.warm.stop_grace_period");
    let grace: u64 = grace.strip_suffix('s').and_then(|seconds| seconds.parse().ok()).expect("seconds");
    let needed = config.drain_delay + config.drain_deadline;
    assert!(grace >= needed.as_secs() + 5, "{grace} s");
    assert_eq!(at(&compose, "services.warm.read_only").as_bool(), Some(true));
    let targets = stage(&text(&compose, "services.warm.build.target"));
    assert!(!targets.is_empty());
}

#[test]
fn the_release_builds_what_the_image_does() {
    let workflow: serde_norway::Value =
        serde_norway::from_str(&std::fs::read_to_string(root().join(".github/workflows/release.yaml")).expect("the release workflow"))
            .expect("YAML");
    let jobs = at(&workflow, "jobs").as_mapping().expect("jobs");
    let uses: Vec<String> =
        jobs.iter().flat_map(|(_, job)| list(job, "steps")).filter_map(|step| at(step, "uses").as_str().map(str::to_owned)).collect();
    assert!(uses.iter().all(|action| action.split_once('@').is_some_and(|(_, version)| version.starts_with('v'))), "{uses:?}");
    let rust = read("Dockerfile").lines().find_map(|line| line.strip_prefix("ARG RUST_VERSION=").map(str::to_owned)).expect("a version");
    assert_eq!(text(&workflow, "env.RUST_VERSION"), rust);
}
