//! Why a predictor elsewhere did not answer, in one plain line.

use std::error::Error;

use lengthwise_core::PredictError;
use tonic::transport::Endpoint;
use tonic::{Status, TimeoutExpired};

pub(crate) fn remote(url: &str, reason: String) -> PredictError {
    PredictError::Remote {
        endpoint: url.to_owned(),
        reason,
    }
}

/// What `http://host:port` or `host:port` names. Other schemes are refused: under `https` prompts would leave unencrypted
/// where encryption was asked for.
pub(crate) fn endpoint(url: &str) -> Result<Endpoint, PredictError> {
    let full = match url.split_once("://") {
        None => format!("http://{url}"),
        Some(("http", _)) => url.to_owned(),
        Some(("https", _)) => {
            let reason = "TLS is not supported, and nothing was sent: give http://host:port, \
                          through a tunnel where the network is not trusted";
            return Err(remote(url, reason.to_owned()));
        }
        Some((scheme, _)) => {
            return Err(remote(url, format!("{scheme} is not supported: give http://host:port")));
        }
    };
    Endpoint::from_shared(full).map_err(|err| remote(url, format!("{}: give http://host:port", causes(&err))))
}

/// Why a call failed.
pub(crate) fn reason(status: &Status) -> String {
    match status.source() {
        Some(source) if is_timeout(source) => {
            "there was no answer in time: check that a length predictor listens there, and is not overloaded".to_owned()
        }
        Some(source) => format!("{:?}: {}", status.code(), causes(source)),
        None => format!("{:?}: {}", status.code(), status.message()),
    }
}

/// Why there is no connection.
pub(crate) fn no_connection(err: &(dyn Error + 'static)) -> String {
    format!(
        "{}: check the address, and that a length predictor listens there",
        causes(err)
    )
}

fn is_timeout(err: &(dyn Error + 'static)) -> bool {
    err.is::<TimeoutExpired>() || err.source().is_some_and(is_timeout)
}

/// An error and its causes, each said once: "transport error: tcp connect error: connection refused".
pub(crate) fn causes(err: &(dyn Error + 'static)) -> String {
    let mut text = err.to_string();
    let mut next = err.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_plain_http() {
        for url in ["http://127.0.0.1:1", "127.0.0.1:1", "localhost:1"] {
            assert!(endpoint(url).is_ok(), "{url}");
        }
        for (url, want) in [
            ("https://127.0.0.1:1", "TLS is not supported, and nothing was sent"),
            ("ftp://127.0.0.1:1", "ftp is not supported"),
            ("http://a b", "give http://host:port"),
        ] {
            let message = endpoint(url).expect_err(url).to_string();
            assert!(message.starts_with(&format!("predictor {url}: ")), "{message}");
            assert!(message.contains(want), "{message}");
        }
    }
}
