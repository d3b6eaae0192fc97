//! What the user is told when a command fails.

use std::process::ExitCode;

/// A set of flags that is wrong in a way the parser cannot see: exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct UsageError(pub String);

/// Prints the error in one line on standard error and gives the exit code.
pub fn report(err: &anyhow::Error) -> ExitCode {
    let broken_pipe = |cause: &(dyn std::error::Error + 'static)| {
        let io = cause.downcast_ref::<std::io::Error>();
        io.is_some_and(|io| io.kind() == std::io::ErrorKind::BrokenPipe)
    };
    // Whoever read our output has seen enough (`lengthwise … | head`).
    if err.downcast_ref::<crate::output::PrintError>().is_some() && err.chain().any(broken_pipe) {
        return ExitCode::SUCCESS;
    }
    crate::logging::above_bars(|| eprintln!("error: {}", one_line(err)));
    ExitCode::from(if err.is::<UsageError>() { 2 } else { 1 })
}

/// The chain of causes joined by ": ". A message that quotes its cause already does not get it twice, and a backtrace that
/// candle wrote behind its own stays out.
fn one_line(err: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in err.chain() {
        let text = cause.to_string();
        let said = text.lines().take_while(|line| !line.starts_with("   0: "));
        let text = said.flat_map(str::split_whitespace).collect::<Vec<_>>().join(" ");
        match line.as_str() {
            "" => line = text,
            said if said.contains(&text) => {}
            _ => line = format!("{line}: {text}"),
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn a_chain_is_one_line_and_says_nothing_twice() {
        let source = std::io::Error::other("disk\nfull");
        let err = Err::<(), _>(source).context("a.jsonl: disk full").context("label");
        assert_eq!(one_line(&err.expect_err("an error")), "label: a.jsonl: disk full");
        let err = anyhow::anyhow!("inner").context("outer");
        assert_eq!(one_line(&err), "outer: inner");
    }

    #[test]
    fn a_backtrace_stays_out() {
        let backtrace = std::backtrace::Backtrace::force_capture();
        let err = anyhow::anyhow!("no\ndriver\n{backtrace}").context("GPU 0 cannot be used");
        assert_eq!(one_line(&err), "GPU 0 cannot be used: no driver");
    }
}
