//! Models by their name on the hub, fetched by the binary from a hub on loopback.

mod server;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use lengthwise_model::{Hub, HubConfig, HubId, OpenProgress};

use crate::support::{Run, binary, finish, run, workspace};
use server::{Behaviour, COMMIT, FakeHub, ID, sha256};

const MODEL_FILES: [&str; 5] = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
];

/// The bundled model as a repository, with much that nobody needs.
fn tiny() -> Result<Behaviour> {
    let folder = workspace().join("data/tiny");
    let mut files = BTreeMap::new();
    for name in MODEL_FILES {
        files.insert(name.to_owned(), fs::read(folder.join(name))?);
    }
    for name in [
        ".gitattributes",
        "README.md",
        "pytorch_model.bin",
        "onnx/model.onnx",
        "tf_model.h5",
    ] {
        files.insert(name.to_owned(), b"not needed".to_vec());
    }
    Ok(Behaviour {
        files,
        ..Behaviour::default()
    })
}

/// A hub and a cache of its own.
struct Place {
    hub: FakeHub,
    home: tempfile::TempDir,
}

impl Place {
    fn new(behaviour: Behaviour) -> Result<Self> {
        Ok(Self {
            hub: FakeHub::start(behaviour)?,
            home: tempfile::tempdir()?,
        })
    }

    fn repo(&self) -> PathBuf {
        self.home.path().join("hub/models--org--name")
    }

    fn snapshot(&self) -> PathBuf {
        self.repo().join("snapshots").join(COMMIT)
    }

    /// A command that asks a model for a length, in this place and no other.
    fn predict(&self, model: &str, variables: &[(&str, &str)]) -> Result<Command> {
        let mut command = Command::new(binary()?);
        for name in [
            "HF_HUB_CACHE",
            "HUGGINGFACE_HUB_CACHE",
            "HF_TOKEN",
            "HUGGING_FACE_HUB_TOKEN",
            "HF_TOKEN_PATH",
        ] {
            command.env_remove(name);
        }
        for name in [
            "HF_HUB_OFFLINE",
            "TRANSFORMERS_OFFLINE",
            "http_proxy",
            "HTTP_PROXY",
            "all_proxy",
            "ALL_PROXY",
        ] {
            command.env_remove(name);
        }
        command
            .env("HF_HOME", self.home.path())
            .env("HF_ENDPOINT", self.hub.endpoint());
        command.envs(variables.iter().copied());
        command.args(["predict", "--model", model, "--json", "Write 30 words about rivers."]);
        Ok(command)
    }

    fn run(&self, model: &str, variables: &[(&str, &str)]) -> Result<Run> {
        finish(&mut self.predict(model, variables)?)
    }

    /// The hub as the library sees it.
    fn library(&self) -> Hub {
        Hub::new(HubConfig {
            endpoint: self.hub.endpoint(),
            cache: Some(self.home.path().join("hub")),
            token: None,
            offline: false,
        })
    }
}

/// The one line that a failure is.
fn failure(run: &Run) -> Result<&str> {
    ensure!(run.code == Some(1) && run.stdout.is_empty(), "{run:?}");
    let errors: Vec<&str> = run.stderr.lines().filter(|line| !line.contains(" INFO ")).collect();
    ensure!(errors.len() == 1 && errors[0].starts_with("error: "), "{run:?}");
    Ok(errors[0])
}

#[test]
fn a_model_is_fetched_once_and_answers_as_from_its_folder() -> Result<()> {
    let place = Place::new(tiny()?)?;
    let want = run(&[
        "predict",
        "--model",
        "data/tiny",
        "--json",
        "Write 30 words about rivers.",
    ])?;
    let got = place.run(ID, &[])?;
    assert_eq!((got.code, &got.stdout), (Some(0), &want.stdout), "{}", got.stderr);
    assert!(
        got.stderr.contains("fetching model.safetensors, 2.17 MiB"),
        "{}",
        got.stderr
    );
    let asked = place.hub.asked();
    let files = MODEL_FILES.map(|name| format!("/{ID}/resolve/{COMMIT}/{name}"));
    let unneeded = asked
        .iter()
        .filter(|a| a.path.contains("/resolve/") && !files.contains(&a.path));
    assert_eq!(unneeded.count(), 0, "{asked:?}");

    assert_eq!(fs::read_to_string(place.repo().join("refs/main"))?, COMMIT);
    for name in MODEL_FILES {
        let bytes = fs::read(workspace().join("data/tiny").join(name))?;
        let link = fs::read_link(place.snapshot().join(name))?;
        let etag = &sha256(&bytes)[..if name == "model.safetensors" { 64 } else { 40 }];
        assert_eq!(link, Path::new("../../blobs").join(etag), "{name}");
        assert_eq!(fs::read(place.snapshot().join(name))?, bytes, "{name}");
    }

    let again = place.run(ID, &[])?;
    assert_eq!((again.code, &again.stdout), (Some(0), &want.stdout), "{}", again.stderr);
    assert_eq!(place.hub.asked().len(), 1, "the commit of the branch alone");
    let offline = place.run(ID, &[("HF_HUB_OFFLINE", "1")])?;
    let pinned = place.run(&format!("{ID}@{COMMIT}"), &[])?;
    assert_eq!((&offline.stdout, &pinned.stdout), (&want.stdout, &want.stdout));
    assert_eq!(place.hub.asked(), [], "neither needs the hub");
    let away = place.run(ID, &[("HF_ENDPOINT", "http://127.0.0.1:9")])?;
    assert_eq!((away.code, &away.stdout), (Some(0), &want.stdout), "{}", away.stderr);
    assert!(away.stderr.contains("going on with what is cached"), "{}", away.stderr);
    Ok(())
}

#[test]
fn a_download_that_was_killed_goes_on_where_it_was() -> Result<()> {
    let mut behaviour = tiny()?;
    // Some 140 pieces, 3 seconds.
    behaviour.throttle = Duration::from_millis(20);
    let place = Place::new(behaviour)?;
    let bytes = fs::read(workspace().join("data/tiny/model.safetensors"))?;
    let partial = place
        .repo()
        .join("blobs")
        .join(format!("{}.incomplete", sha256(&bytes)));
    let length = || fs::metadata(&partial).map_or(0, |m| m.len());

    let mut command = place.predict(ID, &[])?;
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    let began = Instant::now();
    while length() < 300_000 {
        ensure!(began.elapsed() < Duration::from_secs(60), "nothing was fetched");
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill()?;
    child.wait()?;
    let kept = length();
    ensure!((300_000..bytes.len() as u64).contains(&kept), "{kept} bytes were kept");
    assert!(!place.snapshot().join("model.safetensors").exists(), "it is not whole");

    let offline = place.run(ID, &[("HF_HUB_OFFLINE", "1")])?;
    assert!(failure(&offline)?.contains("not completely"), "{}", offline.stderr);

    place.hub.asked();
    place.hub.behave(|b| b.throttle = Duration::ZERO);
    let got = place.run(ID, &[])?;
    assert_eq!(got.code, Some(0), "{}", got.stderr);
    let ranges: Vec<_> = place.hub.asked().into_iter().filter_map(|a| a.range).collect();
    assert!(
        !ranges.is_empty() && ranges.iter().all(|r| *r == format!("bytes={kept}-")),
        "{ranges:?}"
    );
    assert_eq!(fs::read(place.snapshot().join("model.safetensors"))?, bytes);
    assert!(!partial.exists());
    Ok(())
}

#[test]
fn a_lost_connection_is_taken_up_again_and_a_server_without_ranges_begins_anew() -> Result<()> {
    let bytes = fs::read(workspace().join("data/tiny/model.safetensors"))?;
    let mut behaviour = tiny()?;
    behaviour.cut_after = Some(900_000);
    let place = Place::new(behaviour)?;
    let id = HubId::parse(ID).expect("an id");
    let folder = place.library().fetch(&id, &mut ())?;
    assert_eq!(
        fs::read(folder.join("model.safetensors"))?,
        bytes,
        "in three connections"
    );

    let mut behaviour = tiny()?;
    behaviour.no_ranges = true;
    let place = Place::new(behaviour)?;
    let partial = place
        .repo()
        .join("blobs")
        .join(format!("{}.incomplete", sha256(&bytes)));
    fs::create_dir_all(place.repo().join("blobs"))?;
    fs::write(&partial, &bytes[..1000])?;
    let folder = place.library().fetch(&id, &mut ())?;
    assert_eq!(fs::read(folder.join("model.safetensors"))?, bytes);
    Ok(())
}

#[test]
fn what_cannot_be_had_is_one_line_that_says_what_to_do() -> Result<()> {
    let place = Place::new(tiny()?)?;
    let fails = |model: &str, variables: &[(&str, &str)]| {
        Ok::<_, anyhow::Error>(failure(&place.run(model, variables)?)?.to_owned())
    };
    let expect = |got: String, want: &[&str]| {
        for part in want {
            assert!(got.contains(part), "{got}: no \"{part}\"");
        }
    };
    expect(
        fails("org/other", &[])?,
        &["no folder org/other", "check the name", "HF_TOKEN"],
    );
    expect(fails("org/name@v9", &[])?, &["no revision \"v9\""]);
    expect(fails(ID, &[("HF_HUB_OFFLINE", "1")])?, &["HF_HUB_OFFLINE is set"]);
    expect(
        fails(ID, &[("HF_ENDPOINT", "http://127.0.0.1:9")])?,
        &["cannot be reached", "HF_ENDPOINT"],
    );
    expect(fails("no-folder", &[])?, &["no such folder", "org/name"]);

    place.hub.behave(|b| b.token = Some("hf_right".to_owned()));
    expect(fails(ID, &[])?, &["private", "HF_TOKEN"]);
    expect(
        fails(ID, &[("HF_TOKEN", "hf_wrong")])?,
        &["refused the token", "HF_TOKEN"],
    );
    place.hub.behave(|b| b.gated = true);
    expect(
        fails(ID, &[("HF_TOKEN", "hf_right")])?,
        &["is gated", "ask for access", "no access"],
    );
    place.hub.behave(|b| b.gated = false);
    assert_eq!(
        place.run(ID, &[("HF_TOKEN", "hf_right")])?.code,
        Some(0),
        "the store was shown no token of the hub"
    );

    let mut behaviour = tiny()?;
    behaviour.files.remove("model.safetensors");
    behaviour.files.remove("pytorch_model.bin");
    let place = Place::new(behaviour)?;
    expect(
        failure(&place.run(ID, &[])?)?.to_owned(),
        &["no model.safetensors", "no checkpoint"],
    );
    Ok(())
}

#[test]
fn damage_on_the_way_and_a_full_disk_leave_no_wrong_file() -> Result<()> {
    let mut behaviour = tiny()?;
    behaviour.corrupt = true;
    let place = Place::new(behaviour)?;
    let damaged = place.run(ID, &[])?;
    assert!(
        failure(&damaged)?.contains("model.safetensors came damaged"),
        "{}",
        damaged.stderr
    );
    place.hub.behave(|b| b.corrupt = false);
    assert_eq!(place.run(ID, &[])?.code, Some(0), "as it says");

    // A device on which no byte has room.
    if Path::new("/dev/full").exists() {
        let place = Place::new(tiny()?)?;
        let bytes = fs::read(workspace().join("data/tiny/model.safetensors"))?;
        fs::create_dir_all(place.repo().join("blobs"))?;
        let partial = place
            .repo()
            .join("blobs")
            .join(format!("{}.incomplete", sha256(&bytes)));
        std::os::unix::fs::symlink("/dev/full", &partial)?;
        let full = place.run(ID, &[])?;
        let line = failure(&full)?;
        assert!(
            line.contains("no space is left") && line.contains("HF_HUB_CACHE"),
            "{line}"
        );
    }
    Ok(())
}

/// Notes the files that are fetched.
#[derive(Default)]
struct Files(Vec<String>);

impl OpenProgress for Files {
    fn downloaded(&mut self, file: &str, _done_bytes: u64, _total_bytes: u64) {
        if self.0.last().is_none_or(|last| last != file) {
            self.0.push(file.to_owned());
        }
    }

    fn loaded(&mut self, _done: usize, _total: usize) {}
}

#[test]
fn shards_are_fetched_as_their_index_names_them_and_safetensors_come_before_bin() -> Result<()> {
    let shard = |n: u32, form: &str| format!("model-0000{n}-of-00002.{form}");
    let index = |form: &str| {
        let map = serde_json::json!({"a": shard(1, form), "b": shard(2, form), "c": shard(1, form)});
        serde_json::json!({ "weight_map": map }).to_string().into_bytes()
    };
    let mut files = BTreeMap::from([("config.json".to_owned(), b"{}".to_vec())]);
    files.insert("tokenizer.model".to_owned(), b"sp".to_vec());
    files.insert("pytorch_model.bin.index.json".to_owned(), index("bin"));
    for n in [1, 2] {
        files.insert(shard(n, "bin"), vec![n as u8; 70_000]);
    }
    let id = HubId::parse("org/name@refs/pr/1").expect("an id");
    let fetched = |files: &BTreeMap<String, Vec<u8>>| -> Result<_> {
        let place = Place::new(Behaviour {
            files: files.clone(),
            ..Behaviour::default()
        })?;
        let mut fetched = Files::default();
        place.library().fetch(&id, &mut fetched)?;
        assert_eq!(fs::read_to_string(place.repo().join("refs/refs/pr/1"))?, COMMIT);
        Ok(fetched.0)
    };
    let small = ["config.json".to_owned(), "tokenizer.model".to_owned()];
    let with = |index: &str, form: &str| [&small[..], &[index.to_owned(), shard(1, form), shard(2, form)]].concat();
    assert_eq!(fetched(&files)?, with("pytorch_model.bin.index.json", "bin"));
    files.insert("model.safetensors.index.json".to_owned(), index("safetensors"));
    for n in [1, 2] {
        files.insert(shard(n, "safetensors"), vec![n as u8; 70_000]);
    }
    assert_eq!(fetched(&files)?, with("model.safetensors.index.json", "safetensors"));
    files.remove(&shard(2, "safetensors"));
    let err = fetched(&files).expect_err("a shard is missing").to_string();
    assert!(err.contains("model-00002-of-00002.safetensors"), "{err}");
    Ok(())
}
