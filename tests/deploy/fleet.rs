//! What orders the fleet: its pods wait for the Job, under the settings that they serve by.

use super::*;

#[test]
fn the_fleets_pods_wait_for_the_job_and_a_rollout_for_both() {
    let (patch, base) = (document("kustomize/overlays/fleet/deployment.yaml"), document("kustomize/base/deployment.yaml"));
    let (pod, served) = (at(&patch, "spec.template.spec"), container(&base));
    let wait = at(pod, "initContainers.0");
    let arguments: Vec<String> = list(wait, "args").iter().filter_map(|argument| argument.as_str().map(str::to_owned)).collect();
    super::settings::assert_command("fleet/deployment.yaml", &arguments);
    let named = |container: &Value| list(container, "env").iter().find(|variable| text(variable, "name") == "WARM_CONFIG").cloned();
    assert!(named(wait).is_some() && named(wait) == named(served), "it waits for what the server reads");
    let timeout = arguments.iter().position(|argument| argument == "--timeout").map(|i| &arguments[i + 1]).expect("--timeout");
    let timeout = warm::config::parse_duration(timeout).expect("a time").as_secs();
    assert!(number(&patch, "spec.progressDeadlineSeconds") >= timeout + number(&base, "spec.progressDeadlineSeconds"));
    // It has no more rights than the server, and mounts what that mounts.
    for right in ["allowPrivilegeEscalation", "readOnlyRootFilesystem", "capabilities"] {
        let path = format!("securityContext.{right}");
        assert_eq!(at(wait, &path), at(served, &path), "{right}");
    }
    for mount in list(wait, "volumeMounts") {
        assert!(list(served, "volumeMounts").contains(mount), "{mount:?}");
    }
    if let Some(rendered) = rendered("fleet") {
        let deployment = of_kind(&rendered, "Deployment")[0];
        let image = |path: &str| text(at(deployment, "spec.template.spec"), path);
        assert_eq!(image("initContainers.0.image"), image("containers.0.image"), "one image, so one pull");
    }
}
