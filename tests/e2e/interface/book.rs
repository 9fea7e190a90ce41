//! The session of the book (*Cloud Native Go*, chapter 5), in its order, by a library and by curl itself.

use crate::support::http_clients::{agent, curl};
use crate::support::server::Server;

#[test]
fn session_through_library_works() {
    let server = Server::start(&[]);
    let (agent, url) = (agent(), server.url("/v1/key-a"));
    let put = |value: &str| agent.put(&url).send(value).expect("PUT is answered");
    let get = || {
        let mut response = agent.get(&url).call().expect("GET is answered");
        (response.status().as_u16(), response.body_mut().read_to_vec().expect("the body is whole"))
    };

    let mut created = put("Hello, key-value store!");
    assert_eq!(created.status(), 201);
    assert_eq!(created.body_mut().read_to_vec().expect("the body is whole"), b"");
    assert_eq!(get(), (200, b"Hello, key-value store!".to_vec()));
    assert_eq!(put("Hello, key-value store!").status(), 201);
    assert_eq!(put("Hello, again!").status(), 201);
    assert_eq!(get(), (200, b"Hello, again!".to_vec()));

    let delete = || agent.delete(&url).call().expect("DELETE is answered");
    assert_eq!(delete().status(), 200);
    let mut again = delete();
    assert_eq!(again.status(), 200);
    assert_eq!(again.body_mut().read_to_vec().expect("the body is whole"), b"");
    assert_eq!(get(), (404, b"no such key\n".to_vec()));

    let post = agent.post(&url).send("x").expect("POST is answered");
    assert_eq!(post.status(), 405);
    assert_eq!(post.headers().get("allow").map(|value| value.as_bytes()), Some(&b"GET, HEAD, PUT, POST, DELETE"[..]));
}

#[test]
fn session_through_curl_works() {
    let server = Server::start(&[]);
    let url = server.url("/v1/key-a");
    let put = |value: &str| curl(&["-X", "PUT", "-d", value, &url]);

    assert_eq!(put("Hello, key-value store!"), (201, vec![]));
    assert_eq!(curl(&[&url]), (200, b"Hello, key-value store!".to_vec()));
    assert_eq!(put("Hello, key-value store!"), (201, vec![]));
    assert_eq!(put("Hello, again!"), (201, vec![]));
    assert_eq!(curl(&[&url]), (200, b"Hello, again!".to_vec()));
    assert_eq!(curl(&["-X", "DELETE", &url]), (200, vec![]));
    assert_eq!(curl(&["-X", "DELETE", &url]), (200, vec![]));
    assert_eq!(curl(&[&url]), (404, b"no such key\n".to_vec()));

    let (status, answer) = curl(&["-i", "-X", "POST", "-d", "x", &url]);
    let answer = String::from_utf8_lossy(&answer).to_ascii_lowercase();
    assert_eq!(status, 405);
    assert!(answer.contains("\r\nallow: get, head, put, post, delete\r\n"), "{answer}");
}

#[test]
fn curl_uploads_with_expect_continue() {
    let server = Server::start(&[]);
    let file = server.data().join("upload");
    let value: Vec<u8> = (0..=255).cycle().take(100_000).collect();
    std::fs::write(&file, &value).expect("the directory takes a file");
    let (file, url) = (file.to_str().expect("a temporary path is text"), server.url("/v1/uploaded"));

    // curl sends the body after 100 Continue, or after a timeout that is longer than the test.
    let ask_first = ["--expect100-timeout", "50", "-H", "Expect: 100-continue", "-T", file];
    assert_eq!(curl(&[&ask_first[..], &[&url]].concat()), (201, vec![]));
    assert_eq!(curl(&[&url]), (200, value));
}

#[test]
fn curl_uploads_stream_of_unknown_length() {
    let server = Server::start(&[]);
    let file = server.data().join("upload");
    let value: Vec<u8> = (0..=255).cycle().take(100_000).collect();
    std::fs::write(&file, &value).expect("the directory takes a file");
    let (file, url) = (file.to_str().expect("a temporary path is text"), server.url("/v1/uploaded"));

    assert_eq!(curl(&["-H", "Transfer-Encoding: chunked", "-T", file, &url]), (201, vec![]));
    assert_eq!(curl(&[&url]), (200, value));
}
