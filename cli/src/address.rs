//! Addresses to listen on.

/// `host:port`, as far as can be told without asking for the host: whether it is this machine's is seen when it is bound.
pub fn parse_listen(text: &str) -> Result<String, String> {
    let wrong = || "expected host:port, as in 127.0.0.1:50051 or [::1]:50051".to_owned();
    let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
    let bracketed = host.starts_with('[') && host.ends_with(']');
    if host.is_empty() || host.contains(':') && !bracketed || port.parse::<u16>().is_err() {
        return Err(wrong());
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::parse_listen;

    #[test]
    fn an_address_is_a_host_and_a_port() {
        for text in ["127.0.0.1:0", "localhost:50051", "[::1]:65535"] {
            assert_eq!(parse_listen(text).as_deref(), Ok(text));
        }
        for text in [
            "",
            "foo",
            "50051",
            ":50051",
            "127.0.0.1:65536",
            "127.0.0.1:",
            "::1:80",
            "http://127.0.0.1",
        ] {
            parse_listen(text).expect_err(text);
        }
    }
}
