//! How fast an image goes into a repository: `cargo bench -p muster-repository --bench ingest [-- FILE [DIRECTORY]]`.
//!
//! FILE is any raw or qcow2 image (without one, 2 GiB of noise are made in DIRECTORY); DIRECTORY is where the repository is
//! made and removed again (without one, the system's directory for temporary files). Prints GB/s (10^9 bytes of the
//! image's data) for: a first ingest, an ingest of what is there already, the estimate, both at once, a verification, a
//! sequential read back; and for comparison the hash alone and a plain write with fsync of the same bytes. The source is
//! read once before, so it comes from the page cache; writes go to the disk and are synced.

use std::{
    fs::File,
    io::{Read, Write},
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use muster_repository::{
    IngestOptions, Progress, Repository,
    source::{ImageFormat, ReadAt, open_image},
    storage::DirectoryStorage,
};

fn go(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn timed<T>(what: &str, bytes: u64, act: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = act();
    let seconds = start.elapsed().as_secs_f64();
    println!("{what:<44} {:>7.2} GB/s  {seconds:>7.2} s", bytes as f64 / 1e9 / seconds);
    result
}

fn make_noise(path: &Path) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    let mut reader = blake3::Hasher::new().update(b"muster").finalize_xof();
    let mut block = vec![0; 1 << 20];
    for _ in 0..2048 {
        reader.fill(&mut block);
        file.write_all(&block)?;
    }
    file.sync_all()
}

fn main() {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).filter(|a| a != "--bench").map(PathBuf::from).collect();
    let directory = arguments.get(1).cloned().unwrap_or_else(std::env::temp_dir);
    let work = directory.join(format!("muster-bench-{}", std::process::id()));
    std::fs::create_dir(&work).expect("make the work directory");
    let result = std::panic::catch_unwind(|| bench(arguments.first(), &work));
    std::fs::remove_dir_all(&work).expect("remove the work directory");
    if let Err(panic) = result {
        std::panic::resume_unwind(panic);
    }
}

fn bench(file: Option<&PathBuf>, work: &Path) {
    let noise = work.join("noise.raw");
    let file = file.unwrap_or_else(|| {
        make_noise(&noise).expect("make noise");
        &noise
    });
    std::io::copy(&mut File::open(file).expect("open"), &mut std::io::sink()).expect("warm the page cache");
    let source = open_image(file, ImageFormat::Auto).expect("open the image");
    let repository = Repository::open(Arc::new(DirectoryStorage::open(&work.join("repository")).expect("directory")))
        .expect("repository");
    let options = IngestOptions::default();
    let start = Instant::now();
    let first = repository.ingest(&*source, &options, &mut go).expect("ingest");
    let data = first.data.0;
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "{}: {} logical, {} data, {} cores",
        file.display(),
        first.logical,
        first.data,
        std::thread::available_parallelism().map_or(0, |n| n.get())
    );
    println!("{:<44} {:>7.2} GB/s  {seconds:>7.2} s", "ingest, all new", data as f64 / 1e9 / seconds);
    timed("ingest, all there", data, || repository.ingest(&*source, &options, &mut go).expect("ingest"));
    timed("ingest, all there, with estimate", data, || {
        repository.ingest(&*source, &IngestOptions { estimate: true }, &mut go).expect("ingest")
    });
    timed("estimate", data, || muster_repository::estimate::estimate(&*source).expect("estimate"));
    timed("verify", data, || repository.verify(&first.digest, &mut go).expect("verify"));
    timed("read back, one thread, 1 MiB", data, || {
        let manifest = Arc::new(repository.manifest(&first.digest).expect("manifest"));
        let reader = repository.reader(manifest);
        let mut buf = vec![0; 1 << 20];
        let mut at = 0;
        while at < reader.size().0 {
            let len = buf.len().min((reader.size().0 - at) as usize);
            reader.read_at(at, &mut buf[..len]).expect("read");
            at += len as u64;
        }
    });
    let sample = data.min(1 << 30) as usize;
    let mut bytes = vec![1; sample];
    let _ = File::open(file).and_then(|f| f.take(sample as u64).read_exact(&mut bytes));
    timed("hash alone, 64 KiB, one core", sample as u64, || {
        bytes.chunks(65_536).map(muster_repository::digest_of).fold(0u8, |a, d| a ^ d.as_bytes()[0])
    });
    timed("plain write and fsync, 32 MiB files", sample as u64, || {
        for (i, part) in bytes.chunks(32 << 20).enumerate() {
            let mut out = File::create(work.join(format!("plain-{i}"))).expect("create");
            out.write_all(part).expect("write");
            out.sync_all().expect("sync");
        }
    });
}
