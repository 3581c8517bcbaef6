//! Deadlines, as a caller sees them who has no timer of its own.

use bytes::Bytes;

use super::running::Running;

/// The status of a call whose headers arrive and whose body never does. tonic's own timer would answer CANCELLED (1).
async fn status_of_a_call_without_a_body(address: &str, timeout: &str) -> String {
    let stream = tokio::net::TcpStream::connect(address).await.expect("connected");
    let (mut sender, connection) = h2::client::handshake(stream).await.expect("HTTP/2");
    let connection = tokio::spawn(connection);
    let request = http::Request::post(format!("http://{address}/warm.v1.RewardService/Score"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("grpc-timeout", timeout)
        .body(())
        .expect("a request");
    let (answer, mut body) = sender.send_request(request, false).expect("sent");
    // A message of 1000 bytes is announced, of which none follows.
    body.send_data(Bytes::from_static(&[0, 0, 0, 3, 232]), false).expect("sent");
    let answer = answer.await.expect("answered");
    let status = answer.headers().get("grpc-status").map(|status| status.to_str().expect("a number").to_owned());
    drop((body, sender));
    connection.abort();
    status.expect("a status in the headers: the call ended before its body came")
}

/// A call whose headers arrive and nothing else.
async fn headers_only(sender: &mut h2::client::SendRequest<Bytes>, address: &str) -> (h2::client::ResponseFuture, h2::SendStream<Bytes>) {
    let request = http::Request::post(format!("http://{address}/warm.v1.RewardService/Score"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())
        .expect("a request");
    std::future::poll_fn(|context| sender.poll_ready(context)).await.expect("room for a call");
    sender.send_request(request, false).expect("sent")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_server_refuses_a_call_by_its_headers_alone() {
    let server = Running::start(super::members(), &[("admission.max_requests", "1")]).await;
    let stream = tokio::net::TcpStream::connect(&server.address).await.expect("connected");
    let (mut sender, connection) = h2::client::handshake(stream).await.expect("HTTP/2");
    let connection = tokio::spawn(connection);
    // One of them has the only place, and the other is refused although neither has a body.
    let (one, one_body) = headers_only(&mut sender, &server.address).await;
    let (other, other_body) = headers_only(&mut sender, &server.address).await;
    let answer = tokio::select! { answer = one => answer, answer = other => answer }.expect("answered");
    let status = answer.headers().get("grpc-status").map(|status| status.to_str().expect("a number").to_owned());
    assert_eq!(status.as_deref(), Some("8"), "RESOURCE_EXHAUSTED");
    assert!(answer.headers().contains_key("grpc-status-details-bin"), "when to come back");
    assert_eq!(sender.current_max_send_streams(), 1024, "calls on one connection are bounded");
    drop((one_body, other_body, sender));
    connection.abort();
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_body_is_answered_with_deadline_exceeded() {
    let server = Running::start(super::members(), &[]).await;
    for timeout in ["20m", "120m"] {
        assert_eq!(status_of_a_call_without_a_body(&server.address, timeout).await, "4", "{timeout}: DEADLINE_EXCEEDED");
    }
    assert_eq!(server.metric("warm_serve_requests_total{code=\"DEADLINE_EXCEEDED\",rpc=\"Score\"}"), 2.0);
    assert_eq!(server.metric("warm_scorer_in_flight_requests"), 0.0, "their permits are back");
    server.stopped().await;
}
