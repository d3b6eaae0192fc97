//! Batches, deadlines, cancelled callers and a full queue.

use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use anyhow::Result;
use lengthwise_core::PredictError;
use lengthwise_predictor::{BatchingConfig, PredictQueue};
use lengthwise_proto::v1;
use tonic::{Code, Request};

use crate::support::{Control, Running, Scripted, ask, instruction};

fn batching(requests: usize, tokens: usize) -> BatchingConfig {
    BatchingConfig {
        max_batch_requests: NonZeroUsize::new(requests).unwrap(),
        max_batch_tokens: tokens,
        ..BatchingConfig::default()
    }
}

/// The batches that `texts` are put into while the worker is busy.
async fn batches(config: BatchingConfig, texts: &[&str]) -> Result<Vec<Vec<String>>> {
    let control = Control::default();
    let (queue, worker) = PredictQueue::start(Box::new(Scripted(control.clone())), config)?;
    let mut pending = vec![queue.submit(instruction("hold"), None)?];
    control.begun(1).await;
    for text in texts {
        pending.push(queue.submit(instruction(text), None)?);
    }
    control.open();
    for (pending, text) in pending.into_iter().zip([&["hold"], texts].concat()) {
        assert_eq!(pending.wait().await?.max_tokens as usize, text.len());
    }
    drop(queue);
    tokio::task::spawn_blocking(move || worker.join()).await?.unwrap();
    Ok(control.batches().split_off(1))
}

#[tokio::test]
async fn what_waits_is_put_together_up_to_the_limit_of_requests() -> Result<()> {
    assert_eq!(batches(batching(64, 1000), &["1", "2", "3"]).await?, [["1", "2", "3"]]);
    let got = batches(batching(2, 1000), &["1", "2", "3", "4", "5"]).await?;
    assert_eq!(got, [vec!["1", "2"], vec!["3", "4"], vec!["5"]]);
    Ok(())
}

#[tokio::test]
async fn what_waits_is_put_together_up_to_the_limit_of_tokens() -> Result<()> {
    // 8 bytes are 3 tokens, and 40 bytes 11: alone, though more than the limit.
    let (short, long) = ("12345678", "x".repeat(40));
    let got = batches(batching(64, 6), &[short, short, short, &long, short]).await?;
    assert_eq!(got, [vec![short, short], vec![short], vec![long.as_str()], vec![short]]);
    Ok(())
}

#[tokio::test]
async fn an_idle_worker_waits_for_others_only_as_long_as_it_was_told() -> Result<()> {
    let config = BatchingConfig {
        max_wait: Duration::from_millis(300),
        ..batching(2, 1000)
    };
    let control = Control::default();
    let (queue, _worker) = PredictQueue::start(Box::new(Scripted(control.clone())), config)?;
    let began = Instant::now();
    let (first, second) = tokio::join!(
        queue.predict(instruction("1"), None),
        queue.predict(instruction("2"), None)
    );
    first?;
    second?;
    assert_eq!(control.batches(), [["1", "2"]]);
    assert!(began.elapsed() < Duration::from_millis(300), "a full batch waited");
    let began = Instant::now();
    queue.predict(instruction("3"), None).await?;
    let took = began.elapsed();
    assert!(
        (Duration::from_millis(300)..Duration::from_secs(5)).contains(&took),
        "{took:?}"
    );
    Ok(())
}

#[tokio::test]
async fn nobody_waits_for_others_beyond_half_of_the_time_to_a_deadline() -> Result<()> {
    let config = BatchingConfig {
        max_wait: Duration::MAX,
        ..batching(3, 1000)
    };
    let control = Control::default();
    let (queue, _worker) = PredictQueue::start(Box::new(Scripted(control.clone())), config)?;
    let began = Instant::now();
    let deadline = Some(began + Duration::from_secs(10));
    // The first would wait for ever, but goes with the second.
    let both = async {
        tokio::join!(
            queue.predict(instruction("1"), None),
            queue.predict(instruction("22"), deadline)
        )
    };
    let (first, second) = tokio::time::timeout(Duration::from_secs(20), both).await?;
    assert_eq!((first?.max_tokens, second?.max_tokens), (1, 2));
    assert!(began.elapsed() >= Duration::from_secs(4), "nothing was waited for");
    assert_eq!(control.batches(), [["1", "22"]]);
    Ok(())
}

#[tokio::test]
async fn a_queue_makes_room_as_it_fills() -> Result<()> {
    let config = BatchingConfig {
        capacity: NonZeroUsize::MAX,
        ..BatchingConfig::default()
    };
    let (queue, _worker) = PredictQueue::start(Box::new(Scripted(Control::default())), config)?;
    assert_eq!(queue.predict(instruction("1"), None).await?.max_tokens, 1);
    Ok(())
}

#[tokio::test]
async fn concurrent_calls_share_a_batch() -> Result<()> {
    let server = Running::start(BatchingConfig::default()).await?;
    let client = server.client().await?;
    let call = |text: &str| {
        let (mut client, request) = (client.clone(), ask(text, text));
        tokio::spawn(async move { client.predict(request).await })
    };
    let held = call("hold");
    server.control.begun(1).await;
    let others: Vec<_> = ["1", "22", "333"].into_iter().map(call).collect();
    // All three have arrived once the calls on their connection that came later are answered.
    tokio::time::sleep(Duration::from_millis(200)).await;
    client.clone().get_model_info(v1::GetModelInfoRequest {}).await?;
    server.control.open();
    held.await??;
    for (i, other) in others.into_iter().enumerate() {
        assert_eq!(other.await??.into_inner().max_tokens as usize, i + 1);
    }
    let batches = server.control.batches();
    assert_eq!(batches.iter().map(Vec::len).collect::<Vec<_>>(), [1, 3]);
    server.stop().await
}

#[tokio::test]
async fn a_full_queue_turns_callers_away_at_once() -> Result<()> {
    let config = BatchingConfig {
        capacity: NonZeroUsize::new(2).unwrap(),
        ..batching(1, 1000)
    };
    let server = Running::start(config).await?;
    let mut client = server.client().await?;
    let call = |text: &'static str| {
        let mut client = client.clone();
        tokio::spawn(async move { client.predict(ask("a", text)).await })
    };
    let held = call("hold");
    server.control.begun(1).await;
    // Two of these three find a place.
    let three = vec![call("1"), call("2"), call("3")];
    let refused = loop {
        if let Some(done) = three.iter().position(tokio::task::JoinHandle::is_finished) {
            break done;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    };
    let status = client.predict(ask("b", "4")).await.unwrap_err();
    assert_eq!(
        (status.code(), status.message()),
        (Code::ResourceExhausted, "queue is full: 2 requests are waiting")
    );
    server.control.open();
    held.await??;
    for (i, call) in three.into_iter().enumerate() {
        let code = call.await?.map_or_else(|status| status.code(), |_| Code::Ok);
        assert_eq!(
            code,
            if i == refused {
                Code::ResourceExhausted
            } else {
                Code::Ok
            }
        );
    }
    server.stop().await
}

#[tokio::test]
async fn past_its_deadline_a_request_is_answered_so_and_not_worked_on() -> Result<()> {
    let server = Running::start(BatchingConfig::default()).await?;
    let client = server.client().await?;
    let (mut first, mut second) = (client.clone(), client.clone());
    let held = tokio::spawn(async move { first.predict(ask("a", "hold")).await });
    server.control.begun(1).await;
    let mut late = Request::new(ask("b", "late"));
    late.set_timeout(Duration::from_secs(1));
    let status = second.predict(late).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
    let mut late = Request::new(v1::PredictBatchRequest {
        requests: vec![ask("c", "late")],
    });
    late.set_timeout(Duration::from_secs(1));
    let status = second.predict_batch(late).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
    server.control.open();
    held.await??;
    second.predict(ask("d", "next")).await?;
    assert_eq!(server.control.batches(), [["hold"], ["next"]]);
    server.stop().await
}

#[tokio::test]
async fn a_deadline_that_has_passed_takes_no_place_in_the_queue() -> Result<()> {
    let control = Control::default();
    let (queue, _worker) = PredictQueue::start(Box::new(Scripted(control.clone())), BatchingConfig::default())?;
    let got = queue.submit(instruction("late"), Some(Instant::now())).map(drop);
    assert!(matches!(got, Err(PredictError::DeadlineExceeded)), "{got:?}");
    queue.predict(instruction("next"), None).await?;
    assert_eq!(control.batches(), [["next"]]);
    Ok(())
}

#[tokio::test]
async fn no_work_is_done_for_a_caller_who_has_gone() -> Result<()> {
    let server = Running::start(BatchingConfig::default()).await?;
    let client = server.client().await?;
    let mut first = client.clone();
    let held = tokio::spawn(async move { first.predict(ask("a", "hold")).await });
    server.control.begun(1).await;
    let (mut one, mut many, mut stream) = (client.clone(), client.clone(), client.clone());
    let gone = [
        tokio::spawn(async move { one.predict(ask("b", "gone")).await.map(drop) }),
        tokio::spawn(async move {
            let requests = vec![ask("c", "gone"), ask("d", "gone")];
            many.predict_batch(v1::PredictBatchRequest { requests }).await.map(drop)
        }),
        tokio::spawn(async move {
            let mut answers = stream
                .predict_stream(tokio_stream::iter([ask("e", "gone")]))
                .await?
                .into_inner();
            answers.message().await.map(drop)
        }),
    ];
    tokio::time::sleep(Duration::from_millis(200)).await;
    gone.iter().for_each(tokio::task::JoinHandle::abort);
    tokio::time::sleep(Duration::from_millis(200)).await;
    client.clone().get_model_info(v1::GetModelInfoRequest {}).await?;
    server.control.open();
    held.await??;
    client.clone().predict(ask("f", "next")).await?;
    assert_eq!(server.control.batches(), [["hold"], ["next"]]);
    server.stop().await
}
