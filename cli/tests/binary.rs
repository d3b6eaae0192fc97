//! That the binary starts. Cargo builds the binary for this test, and so for the end-to-end tests too, which lie in
//! another package.

use std::process::Command;

#[test]
fn the_version_is_the_packages() -> anyhow::Result<()> {
    let output = Command::new(env!("CARGO_BIN_EXE_lengthwise"))
        .arg("--version")
        .output()?;
    assert_eq!(
        String::from_utf8(output.stdout)?,
        concat!("lengthwise ", env!("CARGO_PKG_VERSION"), "\n")
    );
    Ok(())
}
