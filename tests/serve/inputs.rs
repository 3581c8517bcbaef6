//! What a caller may send by mistake, to a server of real checkpoints: each mistake has an answer that names it, and costs
//! nobody else anything.

use warm::client::ClientError;
use warm::wire::reward_service_client::RewardServiceClient;
use warm::wire::{self, failure, sample::Input};

use super::running::Running;

fn sample(input: Input) -> wire::Sample {
    wire::Sample { input: Some(input) }
}

fn text(text: &str) -> wire::Sample {
    sample(Input::Text(text.to_owned()))
}

fn chat(turns: &[(&str, &str)]) -> wire::Sample {
    let message = |(role, content): &(&str, &str)| wire::Message { role: (*role).into(), content: (*content).into(), ..Default::default() };
    sample(Input::Conversation(wire::Conversation { messages: turns.iter().map(message).collect(), ..Default::default() }))
}

fn ids(ids: impl IntoIterator<Item = u32>) -> wire::Sample {
    sample(Input::Tokens(wire::TokenIds { ids: ids.into_iter().collect() }))
}

fn request(samples: Vec<wire::Sample>) -> wire::ScoreRequest {
    wire::ScoreRequest { samples, ..Default::default() }
}

fn failure(score: &wire::Score) -> (failure::Kind, &str) {
    let failure = score.failure.as_ref().unwrap_or_else(|| panic!("a failure, not {score:?}"));
    (failure.kind(), &failure.message)
}

/// Fields that a refusal names.
fn refused(result: Result<wire::ScoreResponse, ClientError>) -> Vec<String> {
    match result {
        Err(ClientError::Status { code: "INVALID_ARGUMENT", violations, .. }) => violations.into_iter().map(|(field, _)| field).collect(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_small_message_that_unpacks_to_a_huge_one_is_refused() {
    use tonic::codec::CompressionEncoding::{Gzip, Zstd};
    let server = Running::start(super::members(), &[("message.max_decode", "1MB")]).await;
    for encoding in [Gzip, Zstd] {
        let client = RewardServiceClient::connect(format!("http://{}", server.address)).await.expect("connected");
        let mut client = client.send_compressed(encoding);
        let small = client.score(request(vec![text(&"x".repeat(900_000))])).await.expect("within the bound");
        assert_eq!(small.into_inner().scores.len(), 1);
        let refused = client.score(request(vec![text(&"x".repeat(100_000_000))])).await.expect_err("100 MB in a few kilobytes");
        assert!(refused.message().contains("1000000 bytes"), "the limit: {refused}");
        assert!(matches!(refused.code(), tonic::Code::ResourceExhausted | tonic::Code::OutOfRange), "{refused}");
    }
    assert_eq!(server.metric("warm_scorer_in_flight_bytes"), 0.0);
    server.stopped().await;
}

/// A server whose template wants user and assistant to take turns, as many do.
async fn strict_template() -> (tempfile::TempDir, Running) {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("alternate.jinja");
    let template = "{% for message in messages %}\
        {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}\
        {{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}";
    std::fs::write(&path, template).expect("written");
    let settings = [("text.template", path.to_str().expect("UTF-8")), ("message.max_decode", "200kB")];
    let server = Running::start(super::members(), &settings).await;
    (dir, server)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_wrong_with_one_sample_stands_in_its_place() {
    let (_dir, server) = strict_template().await;
    let limit = server.client.get_model().await.expect("model").max_tokens;
    let long = ids((0..limit + 1).map(|i| 10 + i % 50));
    let samples = vec![
        text("fine"),
        chat(&[("user", "a"), ("user", "b")]),
        text(""),
        long.clone(),
        ids([3, 1_000_000]),
        ids([]),
        chat(&[("user", "a"), ("assistant", "")]),
    ];
    let scores = server.client.score(request(samples)).await.expect("scored").scores;
    assert_eq!(scores.iter().map(|score| score.reward.is_some()).collect::<Vec<_>>(), [true, false, false, false, false, false, true]);
    let (kind, message) = failure(&scores[1]);
    assert_eq!(kind, failure::Kind::TemplateRefused);
    assert!(message.contains("roles must alternate"), "the template's own words: {message}");
    assert_eq!(failure(&scores[2]).0, failure::Kind::Empty);
    let (kind, message) = failure(&scores[3]);
    assert_eq!(kind, failure::Kind::TooLong);
    assert!(message.contains(&(limit + 1).to_string()) && message.contains(&limit.to_string()), "{message}");
    let (kind, message) = failure(&scores[4]);
    assert_eq!(kind, failure::Kind::UnknownToken);
    assert!(message.contains("1000000"), "{message}");
    assert_eq!(failure(&scores[5]).0, failure::Kind::Empty);
    for (kind, count) in [("template_refused", 1.0), ("empty", 2.0), ("too_long", 1.0), ("unknown_token", 1.0), ("non_finite", 0.0)] {
        assert_eq!(server.metric(&format!("warm_registry_failures_total{{kind=\"{kind}\"}}")), count, "{kind}");
    }
    assert_eq!(server.metric("warm_scorer_samples_total"), 2.0, "only what can be scored reaches the device");
    // Asked to, the server cuts, and says so.
    let options = wire::ScoreOptions { truncation: wire::Truncation::Left.into(), ..Default::default() };
    let cut = server.client.score(wire::ScoreRequest { options: Some(options), ..request(vec![long]) }).await.expect("scored").scores;
    assert_eq!((cut[0].tokens, cut[0].truncated, cut[0].reward.is_some()), (limit, true, true));
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_long_sample_among_512_leaves_511_scores() {
    let server = Running::start(super::members(), &[]).await;
    let limit = server.client.get_model().await.expect("model").max_tokens;
    let mut samples: Vec<_> = (0..512u32).map(|i| ids((0..5 + i % 7).map(|k| 10 + (i * 31 + k) % 300))).collect();
    samples[200] = ids((0..limit + 1).map(|i| 10 + i % 50));
    let scores = server.client.score(request(samples)).await.expect("scored").scores;
    let failed: Vec<_> = (0..scores.len()).filter(|&i| scores[i].reward.is_none()).collect();
    assert_eq!((scores.len(), failed), (512, vec![200]));
    assert_eq!(server.metric("warm_scorer_samples_total"), 511.0);
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_wrong_with_a_request_names_the_field() {
    let (_dir, server) = strict_template().await;
    let client = &server.client;
    assert_eq!(refused(client.score(request(vec![])).await), ["samples"]);
    assert_eq!(refused(client.score(request(vec![text("a"), wire::Sample::default()])).await), ["samples[1]"]);
    assert_eq!(refused(client.score(request(vec![chat(&[])])).await), ["samples[0].conversation.messages"]);
    let options = wire::ScoreOptions { truncation: 7, scale: 9, ..Default::default() };
    let unknown = wire::ScoreRequest { options: Some(options), ..request(vec![text("a")]) };
    assert_eq!(refused(client.score(unknown).await), ["options.truncation", "options.scale"]);
    let options = wire::ScoreOptions { strict: true, ..Default::default() };
    let strict = wire::ScoreRequest { options: Some(options), ..request(vec![text("a"), chat(&[("assistant", "b")])]) };
    assert_eq!(refused(client.score(strict).await), ["sample 1"]);
    let options = wire::ScoreOptions { scorer: "member-7".into(), ..Default::default() };
    let member = wire::ScoreRequest { options: Some(options), ..request(vec![text("a")]) };
    match client.score(member).await {
        Err(ClientError::Status { code: "NOT_FOUND", message, .. }) => assert!(message.contains("member-0"), "the choices: {message}"),
        other => panic!("{other:?}"),
    }
    let huge = "x".repeat(300_000);
    match client.score(request(vec![text(&huge)])).await {
        Err(ClientError::Status { code: "OUT_OF_RANGE", message, .. }) => assert!(message.contains("200000"), "the limit: {message}"),
        other => panic!("{other:?}"),
    }
    assert!(client.score(request(vec![text("still there")])).await.is_ok());
    server.stopped().await;
}
