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
        // Whoever it runs as has no home; what is downloaded goes to a volume that is theirs.
        assert!(lines.contains(&format!("COPY --from={name}-build --chown=65532:65532 /cache /cache")), "{name}");
        assert!(lines.contains(&"VOLUME /cache".to_owned()), "{name}");
        assert!(lines.iter().any(|line| line.starts_with("ENV") && line.contains("HF_HOME=/cache/hub")), "{name}");
        let health = lines.iter().find(|line| line.starts_with("HEALTHCHECK")).expect("a health check");
        assert!(
            health.contains("CMD [\"/usr/local/bin/warm\", \"health\"") && health.contains(&config.listen.port().to_string()),
            "{health}"
        );
    }
}

/// A variable of the image would beat the file that somebody mounts.
#[test]
fn settings_of_the_image_are_a_file_that_another_can_replace() {
    let file = PathBuf::from("/etc/warm/warm.yaml");
    for name in ["cpu", "cuda"] {
        let lines = stage(name);
        assert!(lines.contains(&format!("COPY deploy/image.yaml {}", file.display())), "{name}");
        let variables: Vec<&str> = lines
            .iter()
            .filter_map(|line| line.strip_prefix("ENV "))
            .flat_map(str::split_whitespace)
            .filter(|set| set.starts_with("WARM_"))
            .collect();
        assert_eq!(variables, [format!("WARM_CONFIG={}", file.display())], "{name}");
    }
    let config = Resolved::new(Sources { file: Some((file, read("image.yaml"))), ..Sources::default() }).expect("settings").config;
    assert!(config.listen.ip().is_unspecified() && config.admin_listen.ip().is_unspecified(), "callers come from outside");
    let defaults = Resolved::new(Sources::default()).expect("defaults").config;
    assert_eq!((config.listen.port(), config.admin_listen.port()), (defaults.listen.port(), defaults.admin_listen.port()));
}

#[test]
fn the_build_copies_all_that_it_reads_and_nothing_of_it_is_ignored() {
    let ignored = read("Dockerfile.dockerignore");
    let allowed: Vec<&str> = ignored.lines().filter_map(|line| line.strip_prefix('!')).collect();
    for name in ["manifests", "cpu-build", "cuda-build", "cpu", "cuda"] {
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
        if name == "manifests" {
            assert_eq!(copied, ["Cargo.toml", "Cargo.lock"]);
        }
        if !name.ends_with("-build") {
            continue;
        }
        // The build script reads the contract. Dependencies are built before any of it is there, from the manifests alone.
        let build = lines.iter().position(|line| line.contains("cargo build")).expect("a build");
        for line in ["COPY build.rs ./", "COPY proto proto", "COPY src src"] {
            assert!(lines.iter().position(|copied| copied == line).is_some_and(|copied| build < copied), "{name}: {line}");
        }
        assert!(lines[..build].iter().filter(|line| line.starts_with("COPY")).all(|line| line.contains("--from=")), "{name}");
        assert!(lines.contains(&"COPY --from=manifests /src /src".to_owned()), "{name}");
        assert!(lines.iter().filter(|line| line.contains("cargo build")).all(|line| line.contains("--locked")), "{name}");
    }
}

/// Instructions of the whole file: the name, and the rest.
fn instructions() -> Vec<(String, String)> {
    let text = read("Dockerfile").replace("\\\n", " ");
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.filter_map(|line| line.split_once(' ')).map(|(name, rest)| (name.to_owned(), rest.trim().to_owned())).collect()
}

/// No daemon builds it in a test, so what a builder would trip over is looked at here.
#[test]
fn a_builder_would_read_the_dockerfile_to_its_end() {
    const KNOWN: [&str; 15] = [
        "ARG",
        "FROM",
        "WORKDIR",
        "COPY",
        "RUN",
        "ENV",
        "LABEL",
        "USER",
        "EXPOSE",
        "STOPSIGNAL",
        "HEALTHCHECK",
        "ENTRYPOINT",
        "CMD",
        "SHELL",
        "VOLUME",
    ];
    let (mut stages, mut arguments): (Vec<String>, Vec<String>) = (Vec::new(), Vec::new());
    let mut global: Vec<String> = Vec::new();
    for (name, rest) in instructions() {
        assert!(KNOWN.contains(&name.as_str()), "{name} is no instruction");
        let words: Vec<&str> = rest.split_whitespace().collect();
        match name.as_str() {
            "ARG" => {
                let argument = rest.split('=').next().unwrap_or_default().to_owned();
                if stages.is_empty() { global.push(argument) } else { arguments.push(argument) }
            }
            "FROM" => {
                let [image, "AS", stage] = words[..] else { panic!("FROM {rest}: a stage without a name") };
                // Either a stage before, or an image of a version that is named.
                let pinned = image.split_once(':').is_some_and(|(_, version)| !version.is_empty() && version != "latest");
                assert!(stages.iter().any(|known| known == image) || pinned, "FROM {rest}");
                assert!(image.match_indices("${").all(|(i, _)| global.iter().any(|known| image[i + 2..].starts_with(known.as_str()))));
                assert!(!stages.contains(&stage.to_owned()), "two stages are called {stage}");
                stages.push(stage.to_owned());
                arguments.clear();
            }
            "COPY" => {
                if let Some(from) = words[0].strip_prefix("--from=") {
                    assert!(stages.iter().any(|stage| stage == from), "COPY {rest}: there is no stage {from} before");
                    let paths: Vec<&&str> = words[1..].iter().filter(|word| !word.starts_with("--")).collect();
                    assert!(paths.len() == 2 && paths.iter().all(|path| path.starts_with('/')), "COPY {rest}");
                }
            }
            // An argument is known from where its stage names it; PATH is the image's own.
            _ => {
                let uses = rest.match_indices("${").filter_map(|(i, _)| rest[i + 2..].split('}').next());
                uses.for_each(|used| {
                    assert!(used == "PATH" || arguments.iter().any(|known| known == used), "{name} {rest}: {used} is not set")
                });
            }
        }
    }
    assert!(["cpu", "cuda"].iter().all(|target| stages.iter().any(|stage| stage == target)), "{stages:?}");
}

#[test]
fn both_images_are_the_same_but_for_what_they_stand_on() {
    let running = |name: &str| -> Vec<String> {
        let lines = stage(name).into_iter().skip(1);
        lines.map(|line| line.replace(&format!("--from={name}-build"), "").replace(", with CUDA", "")).collect()
    };
    // What the driver compiles is kept where the next start finds it.
    let (kept, cuda) = (" CUDA_CACHE_PATH=/cache/nv", running("cuda"));
    assert!(cuda.iter().any(|line| line.contains(kept)), "{cuda:?}");
    assert_eq!(running("cpu"), cuda.iter().map(|line| line.replace(kept, "")).collect::<Vec<_>>());
    let build = |name: &str| -> Vec<String> {
        let lines =
            stage(name).into_iter().filter(|line| line.starts_with("COPY") && !line.contains("--from") || line.contains("cargo build"));
        lines.map(|line| line.replace(" --features \"${CUDA_FEATURES}\"", "")).collect()
    };
    assert_eq!(build("cpu-build"), build("cuda-build"));
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

fn workflow(name: &str) -> serde_norway::Value {
    let path = root().join(".github/workflows").join(name);
    serde_norway::from_str(&std::fs::read_to_string(path).expect("a workflow")).expect("YAML")
}

/// Steps of all jobs of a workflow that use this action; of any where it is empty.
fn steps(workflow: &serde_norway::Value, action: &str) -> Vec<serde_norway::Value> {
    let jobs = at(workflow, "jobs").as_mapping().expect("jobs");
    let all = jobs.iter().flat_map(|(_, job)| list(job, "steps")).filter(|step| at(step, "uses").is_string());
    all.filter(|step| text(step, "uses").starts_with(action)).cloned().collect()
}

#[test]
fn the_release_builds_what_the_image_does() {
    let release = workflow("release.yaml");
    let uses: Vec<String> = steps(&release, "").iter().map(|step| text(step, "uses")).collect();
    assert!(uses.iter().all(|action| action.split_once('@').is_some_and(|(_, version)| version.starts_with('v'))), "{uses:?}");
    let rust = read("Dockerfile").lines().find_map(|line| line.strip_prefix("ARG RUST_VERSION=").map(str::to_owned)).expect("a version");
    assert_eq!(text(&release, "env.RUST_VERSION"), rust);
    assert_eq!(text(&workflow("deploy.yaml"), "jobs.check.container"), format!("rust:{rust}-bookworm"));
}

#[test]
fn nothing_is_published_that_was_not_tested() {
    let release = workflow("release.yaml");
    let runs: Vec<&str> = list(&release, "jobs.check.steps").iter().filter_map(|step| at(step, "run").as_str()).collect();
    assert!(runs.iter().any(|run| run.contains(".ci/run")), "{runs:?}");
    assert!(runs.iter().any(|run| run.contains("GITHUB_REF_NAME")), "the tag is compared with the version: {runs:?}");
    for job in ["binaries", "images"] {
        assert_eq!(text(&release, &format!("jobs.{job}.needs")), "check");
    }
    assert_eq!(list(&release, "jobs.release.needs").len(), 2);
}

#[test]
fn a_release_takes_the_artifacts_of_its_jobs_and_no_others() {
    let release = workflow("release.yaml");
    let pattern = steps(&release, "actions/download-artifact").iter().map(|step| text(step, "with.pattern")).collect::<Vec<_>>();
    let [pattern] = &pattern[..] else { panic!("{pattern:?}") };
    let begin = pattern.strip_suffix('*').expect("a pattern");
    for step in steps(&release, "actions/upload-artifact") {
        assert!(text(&step, "with.name").starts_with(begin), "{step:?}");
    }
    // The builder's record of a build is none.
    for step in steps(&release, "docker/build-push-action") {
        assert_eq!(text(&step, "env.DOCKER_BUILD_RECORD_UPLOAD"), "false");
    }
}

#[test]
fn an_image_for_cards_says_for_which() {
    let release = workflow("release.yaml");
    let images = list(&release, "jobs.images.strategy.matrix.include");
    for image in images {
        let (name, compute) = (text(image, "image"), text(image, "compute"));
        assert_eq!(name, if compute.is_empty() { "cpu".to_owned() } else { format!("cuda-sm{compute}") });
        stage(&text(image, "target"));
    }
    let default = read("Dockerfile").lines().find_map(|line| line.strip_prefix("ARG CUDA_COMPUTE_CAP=").map(str::to_owned)).expect("one");
    assert!(images.iter().any(|image| text(image, "compute") == default), "what is built without a word is released, too");
}

/// What the release asks of its Linux binaries, asked of binaries of both kinds.
#[test]
#[cfg(target_os = "linux")]
fn a_binary_that_needs_a_library_is_told_from_one_that_needs_nothing() {
    // The compiler is what Rust links with; readelf comes with it.
    if !have("cc", "a binary of each kind") || !have("readelf", "a binary of each kind") {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let source = folder.path().join("main.c");
    std::fs::write(&source, "int main(void) { return 0; }\n").expect("written");
    let is_static = |flags: &[&str]| {
        let binary = folder.path().join("binary");
        output(Command::new("cc").args(flags).arg("-o").arg(&binary).arg(&source));
        Command::new(root().join("deploy/static.sh")).arg(&binary).output().expect("started").status.success()
    };
    assert!(is_static(&["-static-pie", "-fPIE"]), "as Rust links for musl");
    assert!(is_static(&["-static", "-no-pie"]));
    assert!(!is_static(&[]));
    let missing = Command::new(root().join("deploy/static.sh")).arg(folder.path().join("missing")).output().expect("started");
    assert!(!missing.status.success(), "what cannot be read is not static");
}
