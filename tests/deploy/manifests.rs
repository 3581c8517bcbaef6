//! The Kubernetes manifests against the server.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;

use serde_norway::Value;
use warm::app::App;
use warm::clock::Clock;
use warm::config::{Resolved, Sources};
use warm::serve::Admin;

use super::expressions::selectors;
use super::*;
use crate::serve::running::Running;

fn base(file: &str) -> Value {
    document(&format!("kustomize/base/{file}"))
}

/// Whether a selector finds what has these labels.
fn selects(selector: &[(String, String)], labels: &[(String, String)]) -> bool {
    !selector.is_empty() && selector.iter().all(|pair| labels.contains(pair))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn probes_ask_what_the_server_answers() {
    let deployment = base("deployment.yaml");
    let container = container(&deployment);
    let config = super::settings::of_config_map(&base("configmap.yaml"));
    let port = |name: &str| {
        let ports = list(container, "ports");
        let found = ports.iter().find(|port| text(port, "name") == name).unwrap_or_else(|| panic!("no port {name}"));
        number(found, "containerPort")
    };
    assert_eq!(port("grpc"), u64::from(config.listen.port()));
    assert_eq!(port("admin"), u64::from(config.admin_listen.port()));
    assert!(config.listen.ip().is_unspecified() && config.admin_listen.ip().is_unspecified(), "kubelet comes from outside");

    let server = Running::start(crate::serve::members(), &[]).await;
    for probe in ["startupProbe", "readinessProbe"] {
        assert_eq!(number(container, &format!("{probe}.grpc.port")), port("grpc"), "{probe}");
        let service = text(container, &format!("{probe}.grpc.service"));
        assert!(!service.is_empty(), "{probe}: the service is named");
        assert!(server.client.is_serving(&service).await.expect("a service that health knows"), "{service}");
    }
    server.stopped().await;

    // The liveness path, on a real admin port.
    let (path, named) = (text(container, "livenessProbe.httpGet.path"), text(container, "livenessProbe.httpGet.port"));
    assert_eq!(named, "admin");
    assert_eq!(get(&path), 200, "{path}");
    // Readiness over HTTP is not used, but annotations name the metrics.
    let annotations = pairs(&deployment, "spec.template.metadata.annotations");
    let annotation = |name: &str| annotations.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone()).expect("annotated");
    assert_eq!(annotation("prometheus.io/port"), port("admin").to_string());
    assert_eq!(get(&annotation("prometheus.io/path")), 200);
}

/// The code of a path of the admin port.
fn get(path: &str) -> u16 {
    let config = Resolved::new(Sources::default()).expect("defaults").config;
    let app = App::new(&config, Clock::system(), "deploy".to_owned()).expect("app");
    let listener = TcpListener::bind("127.0.0.1:0").expect("free port");
    let admin = Admin::start(listener, app.readiness().clone(), app.metrics().clone(), app.engine().clone()).expect("admin");
    let mut stream = TcpStream::connect(admin.address()).expect("admin port");
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").expect("request");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("answer");
    answer.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status line")
}

#[test]
fn a_pod_has_longer_than_all_that_happens_before_its_end() {
    for (overlay, deployment, config_map) in every_deployment() {
        let config = super::settings::of_config_map(&config_map);
        let grace = number(&deployment, "spec.template.spec.terminationGracePeriodSeconds");
        let before = number(container(&deployment), "lifecycle.preStop.sleep.seconds");
        let needed = before + config.drain_delay.as_secs() + config.drain_deadline.as_secs();
        assert!(grace >= needed + 5, "{overlay}: {grace} s of grace, and {needed} s of preStop and drain");
        // Ready is asked for often enough that the news spreads within the drain's delay and preStop.
        let period = number(container(&deployment), "readinessProbe.periodSeconds");
        assert!(period <= before + config.drain_delay.as_secs(), "{overlay}: readiness is asked for every {period} s");
    }
}

/// Base, and every overlay where it can be rendered: its Deployment and its ConfigMap.
fn every_deployment() -> Vec<(String, Value, Value)> {
    let mut all = vec![("base".to_owned(), base("deployment.yaml"), base("configmap.yaml"))];
    for overlay in OVERLAYS {
        if let Some(rendered) = rendered(overlay) {
            let one = |kind: &str| of_kind(&rendered, kind).into_iter().next().unwrap_or_else(|| panic!("{overlay}: no {kind}")).clone();
            all.push((overlay.to_owned(), one("Deployment"), one("ConfigMap")));
        }
    }
    all
}

#[test]
fn capacity_never_falls_during_a_rollout_or_a_drain() {
    let deployment = base("deployment.yaml");
    assert_eq!(number(&deployment, "spec.strategy.rollingUpdate.maxUnavailable"), 0);
    let startup =
        number(container(&deployment), "startupProbe.periodSeconds") * number(container(&deployment), "startupProbe.failureThreshold");
    assert!(startup >= 1200, "a load of twenty minutes is not cut: {startup} s");
    assert!(number(&deployment, "spec.progressDeadlineSeconds") > startup, "a rollout waits for the slowest start");
    assert_eq!(number(&base("poddisruptionbudget.yaml"), "spec.maxUnavailable"), 1);
    assert!(list(&deployment, "spec.template.spec.topologySpreadConstraints").len() >= 2);
}

#[test]
fn every_selector_finds_the_pods() {
    let deployment = base("deployment.yaml");
    let pods = pairs(&deployment, "spec.template.metadata.labels");
    let names: Vec<String> = list(container(&deployment), "ports").iter().map(|port| text(port, "name")).collect();
    let mut checked = 0;
    for (file, manifest) in manifests() {
        let (kind, of_others) = (text(&manifest, "kind"), ["merge-", "-downloads"].iter().any(|part| file.contains(part)));
        let path = match kind.as_str() {
            "Service" => "spec.selector",
            "Deployment" | "PodDisruptionBudget" | "PodMonitor" => "spec.selector.matchLabels",
            "NetworkPolicy" => "spec.podSelector.matchLabels",
            _ => continue,
        };
        let selector = pairs(&manifest, path);
        if selector.is_empty() && kind == "Deployment" {
            continue; // a patch
        }
        assert_eq!(selects(&selector, &pods), !of_others, "{file}: {selector:?}");
        checked += 1;
        for port in list(&manifest, "spec.ports") {
            assert!(names.contains(&text(port, "targetPort")), "{file}: {port:?}");
            assert_eq!(text(port, "appProtocol"), "grpc", "{file}");
        }
        for endpoint in list(&manifest, "spec.podMetricsEndpoints") {
            assert!(names.contains(&text(endpoint, "port")), "{file}");
            assert_eq!(get(&text(endpoint, "path")), 200, "{file}");
        }
    }
    assert!(checked >= 7, "{checked} selectors");
    let job = document("kustomize/overlays/fleet/merge-job.yaml");
    for policy in ["kustomize/overlays/fleet/merge-networkpolicy.yaml", "kustomize/base/networkpolicy-downloads.yaml"] {
        let selector = pairs(&document(policy), "spec.podSelector.matchLabels");
        assert!(selects(&selector, &pairs(&job, "spec.template.metadata.labels")), "{policy}");
    }
}

/// Ports that a policy lets its pods call, with whether only in some places.
fn calls(policy: &Value) -> Vec<(u64, bool)> {
    let rules = list(policy, "spec.egress").iter();
    rules.flat_map(|rule| list(rule, "ports").iter().map(|port| (number(port, "port"), !list(rule, "to").is_empty()))).collect()
}

#[test]
fn servers_may_send_traces_and_only_pods_that_download_may_call_hubs_and_buckets() {
    let (server, downloads) = (base("networkpolicy.yaml"), base("networkpolicy-downloads.yaml"));
    assert_eq!(strings(&server, "spec.policyTypes"), ["Ingress", "Egress"], "what is not named is forbidden");
    assert_eq!(strings(&downloads, "spec.policyTypes"), ["Egress"], "and nobody may call a pod for its sake");
    let mut of_server = calls(&server);
    of_server.dedup();
    assert_eq!(of_server, [(53, false), (4317, true)], "names, and a collector in one namespace");
    let of_downloads = calls(&downloads);
    for needed in [(53, false), (443, false), (80, true)] {
        assert!(of_downloads.contains(&needed), "{needed:?} of {of_downloads:?}");
    }
    // A collector of that port is what the settings name.
    let traced = vec![("traces.endpoint".to_owned(), "http://collector.monitoring:4317".to_owned())];
    assert!(Resolved::new(Sources { flags: traced, ..Sources::default() }).is_ok());
}

fn strings(value: &Value, path: &str) -> Vec<String> {
    list(value, path).iter().filter_map(Value::as_str).map(str::to_owned).collect()
}

#[test]
fn what_the_settings_write_is_on_a_volume_that_can_be_written_and_what_they_read_is_not() {
    for (overlay, deployment, map) in every_deployment() {
        let (config, container) = (super::settings::of_config_map(&map), container(&deployment));
        let writable = |path: &std::path::Path| {
            let inside = |mount: &&Value| path.starts_with(text(mount, "mountPath"));
            let mount = list(container, "volumeMounts").iter().find(inside);
            mount.map(|mount| at(mount, "readOnly").as_bool() != Some(true))
        };
        let written = [config.cache.map(|cache| cache.dir), config.live.state.clone()];
        for path in written.iter().flatten() {
            assert_eq!(writable(path), Some(true), "{overlay}: {}", path.display());
        }
        let hub = list(container, "env").iter().find(|variable| text(variable, "name") == "HF_HOME").map(|hub| text(hub, "value"));
        assert_eq!(hub.as_deref().and_then(|hub| writable(std::path::Path::new(hub))), Some(true), "{overlay}");
        for path in ["/models/rm-0", "/models/merged/r1"] {
            assert_eq!(writable(std::path::Path::new(path)), Some(false), "{overlay}: {path}");
        }
        // Restarts of a container find what was live, and a change of the ConfigMap is a reload.
        assert!(config.live.state.is_some() && config.live.watch.is_some(), "{overlay}");
    }
}

#[test]
fn a_fleet_swaps_together_and_waits_for_the_word() {
    let map = document("kustomize/overlays/fleet/configmap.yaml");
    assert_eq!(super::settings::of_config_map(&map).live.activation, warm::registry::Activation::OnCall);
}

#[test]
fn pods_have_no_rights_that_they_do_not_need() {
    let account = base("serviceaccount.yaml");
    assert_eq!(at(&account, "automountServiceAccountToken").as_bool(), Some(false));
    for workload in [base("deployment.yaml"), document("kustomize/overlays/fleet/merge-job.yaml")] {
        let pod = at(&workload, "spec.template.spec");
        assert_eq!(text(pod, "serviceAccountName"), text(&account, "metadata.name"));
        assert_eq!(at(pod, "automountServiceAccountToken").as_bool(), Some(false));
        assert_eq!(at(pod, "securityContext.runAsNonRoot").as_bool(), Some(true));
        assert!(number(pod, "securityContext.runAsUser") >= 10_000);
        assert_eq!(text(pod, "securityContext.seccompProfile.type"), "RuntimeDefault");
        let container = container(&workload);
        assert_eq!(at(container, "securityContext.allowPrivilegeEscalation").as_bool(), Some(false));
        assert_eq!(at(container, "securityContext.readOnlyRootFilesystem").as_bool(), Some(true));
        assert_eq!(text(container, "securityContext.capabilities.drop.0"), "ALL");
        // Whatever is mounted exists, and a folder is mounted as a whole: a file of it would never see a change.
        let volumes: Vec<String> = list(pod, "volumes").iter().map(|volume| text(volume, "name")).collect();
        for mount in list(container, "volumeMounts") {
            assert!(volumes.contains(&text(mount, "name")), "{mount:?}");
            assert!(at(mount, "subPath").is_null(), "{mount:?}");
        }
        // The program's own temporary files, on a root that is read-only.
        assert!(list(container, "volumeMounts").iter().any(|mount| text(mount, "mountPath") == "/tmp"));
    }
}

#[test]
fn only_what_old_kustomize_knows_is_used_and_every_file_is_there() {
    const KNOWN: [&str; 12] = [
        "apiVersion",
        "kind",
        "bases",
        "resources",
        "patchesStrategicMerge",
        "patchesJson6902",
        "images",
        "configMapGenerator",
        "generatorOptions",
        "namespace",
        "vars",
        "configurations",
    ];
    for folder in [
        "kustomize/base",
        "kustomize/overlays/cpu",
        "kustomize/overlays/gpu",
        "kustomize/overlays/fleet",
        "kustomize/overlays/monitoring",
        "monitoring",
    ] {
        let here = root().join("deploy").join(folder);
        let kustomization = document(&format!("{folder}/kustomization.yaml"));
        for key in keys(&kustomization) {
            assert!(KNOWN.contains(&key.as_str()), "{folder}: `{key}` is not of kustomize 2.0");
        }
        let mut named: Vec<String> = Vec::new();
        for key in ["bases", "resources", "patchesStrategicMerge", "configurations"] {
            named.extend(list(&kustomization, key).iter().filter_map(Value::as_str).map(str::to_owned));
        }
        named.extend(list(&kustomization, "patchesJson6902").iter().map(|patch| text(patch, "path")));
        named.extend(
            list(&kustomization, "configMapGenerator")
                .iter()
                .flat_map(|map| list(map, "files"))
                .filter_map(Value::as_str)
                .map(str::to_owned),
        );
        for name in &named {
            assert!(here.join(name).exists(), "{folder}: {name}");
            // kustomize 2.0 takes folders only as bases, and files only from below itself.
            let is_base = list(&kustomization, "bases").iter().any(|base| base.as_str() == Some(name));
            assert_eq!(here.join(name).is_dir(), is_base, "{folder}: {name}");
        }
        for file in yaml_files(&here) {
            let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let own = ["kustomization.yaml", "warm.rules.yaml", "warm.rules.test.yaml"].contains(&name.as_str());
            assert!(own || named.contains(&name), "{folder}: nobody names {name}");
        }
    }
}

fn keys(value: &Value) -> Vec<String> {
    value.as_mapping().expect("a mapping").keys().map(|key| key.as_str().unwrap_or_default().to_owned()).collect()
}

#[test]
fn the_scaler_owns_the_number_of_replicas_and_its_floor_is_what_it_falls_back_to() {
    let scaled = document("kustomize/overlays/fleet/scaledobject.yaml");
    assert_eq!(text(&scaled, "spec.scaleTargetRef.name"), text(&base("deployment.yaml"), "metadata.name"));
    assert_eq!(number(&scaled, "spec.fallback.replicas"), number(&scaled, "spec.minReplicaCount"));
    assert_eq!(text(&scaled, "spec.fallback.behavior"), "currentReplicasIfHigher", "a fleet does not shrink with Prometheus");
    assert!(
        number(&scaled, "spec.minReplicaCount") >= 2 && number(&scaled, "spec.maxReplicaCount") > number(&scaled, "spec.minReplicaCount")
    );
    if let Some(rendered) = rendered("fleet") {
        let deployments = of_kind(&rendered, "Deployment");
        assert!(at(deployments[0], "spec.replicas").is_null(), "an apply would reset the number");
    }
}

/// What a kustomization of one's own over one of ours renders to.
fn rendered_under(own: &str, overlay: &str) -> Vec<Value> {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let path = folder.path().canonicalize().expect("a path");
    let base = root().join("deploy/kustomize/overlays").join(overlay).display().to_string();
    // kustomize 2.0 takes relative paths only.
    let base = format!("{}{}", "../".repeat(path.components().count() - 1), base.trim_start_matches('/'));
    std::fs::write(path.join("kustomization.yaml"), format!("bases: [{base}]\n{own}")).expect("written");
    documents(&output(Command::new("kubectl").arg("kustomize").arg(&path)))
}

/// The namespaces of a rendering, which must be one, and the scaler's query.
fn scaled_in(all: &[Value]) -> (String, String) {
    let namespaces: std::collections::BTreeSet<String> = all.iter().map(|object| text(object, "metadata.namespace")).collect();
    assert_eq!(namespaces.len(), 1, "{namespaces:?}");
    let trigger = &list(of_kind(all, "ScaledObject")[0], "spec.triggers")[0];
    assert_eq!(text(trigger, "metadata.ignoreNullValues"), "false", "an empty answer is no queue of 0");
    (namespaces.into_iter().next().expect("one"), text(trigger, "metadata.query"))
}

#[test]
fn the_scaler_asks_for_the_queue_of_the_namespace_that_it_is_rendered_for() {
    let asks = |namespace: &str| vec![("namespace".to_owned(), "=".to_owned(), namespace.to_owned())];
    let Some(fleet) = rendered("fleet") else { return };
    let (namespace, query) = scaled_in(&fleet);
    assert_eq!(selectors(&query)[0].matchers, asks(&namespace));
    let (namespace, query) = scaled_in(&rendered_under("namespace: rewards\n", "fleet"));
    assert_eq!((namespace.as_str(), &selectors(&query)[0].matchers), ("rewards", &asks("rewards")));
}

#[test]
fn the_fleet_serves_what_its_job_writes() {
    let map = document("kustomize/overlays/fleet/configmap.yaml");
    let served: Value = serde_norway::from_str(&super::settings::file_of(&map, "served.yaml")).expect("YAML");
    let job = document("kustomize/overlays/fleet/merge-job.yaml");
    let arguments = strings(container(&job), "args");
    let out = arguments.iter().position(|argument| argument == "--out").map(|i| arguments[i + 1].clone()).expect("--out");
    assert_eq!(text(&served, "members.0.path"), out);
}

/// A drill on what nobody reads shows nothing.
#[test]
fn the_checkpoint_that_the_drill_corrupts_is_one_that_is_served() {
    let runbook = read("RUNBOOK.md");
    let drill = runbook.lines().find(|line| line.starts_with("| corrupt a checkpoint |")).expect("the drill");
    for (map, recipe) in [("kustomize/overlays/fleet/configmap.yaml", "served.yaml"), ("kustomize/base/configmap.yaml", "recipe.yaml")] {
        let recipe = super::settings::file_of(&document(map), recipe);
        let path = text(&documents(&recipe)[0], "members.0.path");
        assert!(drill.contains(&path), "{map} serves {path}: {drill}");
    }
}

#[test]
fn what_a_release_says_of_its_images_reaches_servers_and_job() {
    let folder = tempfile::tempdir().expect("a folder");
    let (cpu, cuda) =
        (format!("ghcr.io/somebody/warm@sha256:{}", "a".repeat(64)), format!("ghcr.io/somebody/warm@sha256:{}", "b".repeat(64)));
    for (file, image) in [("image-cpu.txt", &cpu), ("image-cuda-sm90.txt", &cuda)] {
        std::fs::write(folder.path().join(file), format!("{image}\n")).expect("written");
    }
    let script = root().join("deploy/images.sh");
    assert_eq!(output(Command::new(&script).arg(folder.path())), "images-sm90.yaml\n");
    let images = std::fs::read_to_string(folder.path().join("images-sm90.yaml")).expect("written");
    let image = |all: &[Value], kind: &str| text(container(of_kind(all, kind)[0]), "image");
    if have("kubectl", "rendering of images") {
        let fleet = rendered_under(&images, "fleet");
        assert_eq!((image(&fleet, "Deployment"), image(&fleet, "Job")), (cuda, cpu.clone()));
        assert_eq!(image(&rendered_under(&images, "cpu"), "Deployment"), cpu);
    }
    // A tag may move.
    std::fs::write(folder.path().join("image-cpu.txt"), "ghcr.io/somebody/warm:cpu\n").expect("written");
    assert!(!Command::new(&script).arg(folder.path()).output().expect("started").status.success());
}

#[test]
fn overlays_render_and_say_where_they_run() {
    let Some(cpu) = rendered("cpu") else { return };
    let gpu = rendered("gpu").expect("kubectl is here");
    let image = |all: &[Value]| text(container(of_kind(all, "Deployment")[0]), "image");
    assert_eq!((image(&cpu).as_str(), image(&gpu).as_str()), ("warm-cpu:name-your-image", "warm-cuda:name-your-image"));
    let limits = at(container(of_kind(&gpu, "Deployment")[0]), "resources.limits");
    assert_eq!(limits.get("nvidia.com/gpu").and_then(Value::as_str), Some("1"));
    let env = list(container(of_kind(&gpu, "Deployment")[0]), "env");
    assert!(env.iter().any(|variable| text(variable, "name") == "WARM_CONFIG"), "the base's variables stay");
}
