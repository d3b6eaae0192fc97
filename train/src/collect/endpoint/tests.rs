//! The decoder against a small server of its own.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use lengthwise_core::{FinishReason, Prompt, SamplingParams};
use serde_json::{Value, json};

use super::*;

/// What reached the server: first line, headers in lower case, JSON body.
struct Received {
    line: String,
    headers: String,
    body: Value,
}

fn read_request(stream: &TcpStream) -> Option<Received> {
    let mut reader = BufReader::new(stream);
    let (mut line, mut headers) = (String::new(), String::new());
    reader.read_line(&mut line).ok()?;
    let mut length = 0;
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).ok()?;
        if header.trim().is_empty() {
            break;
        }
        let header = header.to_ascii_lowercase();
        if let Some(value) = header.strip_prefix("content-length:") {
            length = value.trim().parse().ok()?;
        }
        headers.push_str(&header);
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let body = serde_json::from_slice(&body).ok()?;
    Some(Received { line, headers, body })
}

/// A server whose `n`-th reply is `reply(n, request)`: status line with headers, and body.
fn server(reply: impl Fn(usize, Received) -> (String, String) + Send + Sync + 'static) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let url = format!("http://{}", listener.local_addr().expect("bound"));
    let count = Arc::new(AtomicUsize::new(0));
    let (served, reply) = (count.clone(), Arc::new(reply));
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let (served, reply) = (served.clone(), reply.clone());
            std::thread::spawn(move || {
                let Some(received) = read_request(&stream) else { return };
                let (head, body) = reply(served.fetch_add(1, Ordering::SeqCst), received);
                let length = body.len();
                let _ = write!(
                    stream,
                    "HTTP/1.1 {head}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
                );
            });
        }
    });
    (url, count)
}

fn ok(tokens: u64, finish: &str) -> (String, String) {
    let body = json!({"choices": [{"message": {"content": "hi"}, "finish_reason": finish}],
        "usage": {"completion_tokens": tokens}});
    ("200 OK".to_owned(), body.to_string())
}

fn status(head: &str, body: &str) -> (String, String) {
    (head.to_owned(), body.to_owned())
}

/// Which request it is: its prompt is its number.
fn number(received: &Received) -> u64 {
    let content = received.body["messages"][0]["content"].as_str().expect("a text");
    content.parse().expect("the request's number")
}

fn requests(n: usize) -> Vec<Request> {
    let request = |i: usize| Request {
        id: i.to_string().into(),
        prompt: Prompt::Instruction(format!("{i}")),
        max_new_tokens: 50,
        sampling: SamplingParams::GREEDY,
    };
    (0..n).map(request).collect()
}

fn config(url: &str) -> EndpointConfig {
    EndpointConfig {
        max_attempts: 3,
        ..EndpointConfig::new(url, "m")
    }
}

/// Every answer that came, and how the run ended.
fn decode(config: EndpointConfig, n: usize) -> (BTreeMap<String, Response>, Result<(), DecodeError>) {
    let mut answers = BTreeMap::new();
    let result = EndpointDecoder::new(config).decode(requests(n), &mut |response| {
        answers.insert(response.id.to_string(), response);
        Ok(())
    });
    (answers, result)
}

fn failure(url: &str) -> String {
    decode(config(url), 1).1.expect_err("failed").to_string()
}

#[test]
fn every_answer_comes_back_under_its_own_id() {
    let (url, _) = server(|_, received| ok(number(&received) + 1, "stop"));
    let (answers, result) = decode(config(&format!("{url}/v1/")), 40);
    result.expect("answered");
    assert_eq!(answers.len(), 40);
    assert!(
        answers
            .iter()
            .all(|(id, a)| id.parse::<u32>().expect("a number") + 1 == a.tokens)
    );
}

#[test]
fn the_request_is_openais() {
    let (url, _) = server(|_, received| {
        assert_eq!(received.line, "POST /v1/chat/completions HTTP/1.1\r\n");
        assert!(
            received.headers.contains("authorization: bearer key\r\n"),
            "{}",
            received.headers
        );
        let want = json!({"model": "m", "messages": [{"role": "user", "content": "0"}], "max_tokens": 50,
            "temperature": 0.0, "top_p": 1.0, "seed": 0});
        assert_eq!(received.body, want);
        ok(50, "length")
    });
    let config = EndpointConfig {
        api_key: Some("key".to_owned()),
        ..config(&url)
    };
    let (answers, result) = decode(config, 1);
    result.expect("a request as the server wants it");
    assert_eq!(answers["0"].finish, FinishReason::Length);
    assert_eq!(answers["0"].text, "hi");
}

#[test]
fn an_address_is_taken_with_or_without_its_end() {
    for url in [
        "http://h",
        "http://h/",
        "http://h/v1",
        "http://h/v1/",
        "http://h/v1/chat/completions",
    ] {
        assert_eq!(config(url).completions_url(), "http://h/v1/chat/completions");
    }
    let other = "http://h/v2/openai/chat/completions";
    assert_eq!(config(other).completions_url(), other);
}

#[test]
fn passing_failures_are_tried_again() {
    let (url, count) = server(|n, _| match n {
        0 => status("503 Busy", ""),
        1 => status("200 OK", "{\"choices\": ["),
        _ => ok(9, "length"),
    });
    let (answers, result) = decode(config(&url), 1);
    result.expect("answered at last");
    assert_eq!(answers["0"].tokens, 9);
    assert_eq!(count.load(Ordering::SeqCst), 3);
}

#[test]
fn the_server_says_how_long_to_wait() {
    let (url, _) = server(|n, _| match n {
        0 => status("429 Slow down\r\nretry-after: 1", ""),
        _ => ok(9, "stop"),
    });
    let began = Instant::now();
    decode(config(&url), 1).1.expect("answered at last");
    // Our own first wait is at most half a second.
    assert!(began.elapsed() >= Duration::from_secs(1), "{:?}", began.elapsed());
}

#[test]
fn tries_come_to_an_end() {
    let (url, count) = server(|_, _| {
        status(
            "500 Oops\r\nretry-after: 0",
            "{\"error\": {\"message\": \"out of\\nmemory\"}}",
        )
    });
    let err = failure(&url);
    assert!(
        err.contains("500") && err.contains("out of memory (gave up after 3 tries)"),
        "{err}"
    );
    assert_eq!(count.load(Ordering::SeqCst), 3);
    // Nobody listens there any more.
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let gone = format!("http://{}", listener.local_addr().expect("bound"));
    drop(listener);
    let err = failure(&gone);
    assert!(err.contains(&gone) && err.contains("gave up after 3 tries"), "{err}");
}

#[test]
fn a_refusal_is_final_and_carries_the_servers_words() {
    let refusal = json!({"error": {"message": "no such model"}}).to_string();
    let (url, count) = server(move |_, _| status("404 Not Found", &refusal));
    let err = failure(&url);
    assert!(err.contains("no such model") && err.contains("404"), "{err}");
    assert_eq!(count.load(Ordering::SeqCst), 1);
    let (url, _) = server(|_, _| status("200 OK", "{\"choices\": [{\"message\": {\"content\": \"x\"}}]}"));
    assert!(failure(&url).contains("no usage.completion_tokens"));
    let (url, _) = server(|_, _| status("200 OK", "{}"));
    assert!(failure(&url).contains("no choices"));
    assert!(failure("no address").contains("the address cannot be used"));
}

#[test]
fn a_fault_of_one_request_is_told_from_a_fault_of_all() {
    for (code, refused) in [
        ("400 Bad Request", true),
        ("422 Unprocessable Entity", true),
        ("401 Unauthorized", false),
        ("403 Forbidden", false),
    ] {
        let (url, _) = server(move |_, received| match number(&received) {
            0 => status(code, "no"),
            _ => ok(9, "stop"),
        });
        // The second request is run whatever comes of the first, unless that is a fault of all.
        let config = EndpointConfig {
            concurrency: 1,
            ..config(&url)
        };
        let (answers, result) = decode(config, 2);
        let err = result.expect_err("failed");
        let is_refused = matches!(&err, DecodeError::Refused { refusals, .. } if refusals[0].id.as_str() == "0");
        assert_eq!((is_refused, answers.len()), (refused, usize::from(refused)), "{err:?}");
    }
}

#[test]
fn a_server_that_hangs_is_not_waited_for_without_end() {
    let (url, count) = server(|_, _| {
        std::thread::sleep(Duration::from_secs(8));
        ok(9, "stop")
    });
    let config = EndpointConfig {
        max_attempts: 2,
        timeout: Duration::from_secs(1),
        ..config(&url)
    };
    let err = decode(config, 1).1.expect_err("no answer").to_string();
    assert!(err.contains("no answer within 1 s (gave up after 2 tries)"), "{err}");
    assert_eq!(count.load(Ordering::SeqCst), 2);
}

#[test]
fn a_failure_for_good_stops_the_run_and_keeps_what_was_answered() {
    // The first is refused at once; the second waits for a server that wants half a minute, and is not waited for.
    let (url, count) = server(|_, received| match number(&received) {
        0 => {
            std::thread::sleep(Duration::from_millis(100));
            status(
                "400 Bad Request",
                "{\"message\": \"This model's maximum context length is 60 tokens. However, \
                your messages resulted in 99 tokens.\"}",
            )
        }
        1 => status("429 Slow down\r\nretry-after: 30", ""),
        _ => {
            std::thread::sleep(Duration::from_millis(300));
            ok(7, "stop")
        }
    });
    let began = Instant::now();
    let config = EndpointConfig {
        concurrency: 3,
        ..config(&url)
    };
    let (answers, result) = decode(config, 9);
    match result {
        Err(DecodeError::PromptTooLong { id, got: 99, max: 10 }) => assert_eq!(id.as_str(), "0"),
        other => panic!("{other:?}"),
    }
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    assert_eq!(answers.keys().collect::<Vec<_>>(), ["2"]);
    assert_eq!(count.load(Ordering::SeqCst), 3);
}
