//! Imports: from an image file to chunks in the repository and a record in the database.

use std::{ops::ControlFlow, path::PathBuf, sync::Arc};

use muster_api::{BootFiles, Estimate, ImageFormat};
use muster_common::{ByteLen, Digest, ErrorCode};
use muster_repository::{
    Defect, IngestOptions, Progress, Repository,
    estimate::Estimator,
    source::{self},
};

use crate::{
    core::{Handle, source_format},
    db::StoredImage,
    jobs::Work,
    refusal::Refusal,
};

/// What is to be imported.
#[derive(Debug)]
pub struct Import {
    pub name: String,
    pub format: ImageFormat,
    pub new_revision: bool,
    pub source: PathBuf,
    /// The source is ours: an upload, removed whatever comes of it.
    pub remove_source: bool,
    pub kernel: Option<BootFile>,
    pub initrd: Option<BootFile>,
    pub cmdline: String,
    pub now_us: u64,
}

/// Where a kernel or an initrd comes from.
#[derive(Debug)]
pub enum BootFile {
    Path(PathBuf),
    Blob(Digest),
}

/// Removes an upload when the import is over, however it ends.
struct Upload(Option<PathBuf>);
impl Drop for Upload {
    fn drop(&mut self) {
        if let Some(path) = self.0.take()
            && let Err(error) = std::fs::remove_file(&path)
        {
            tracing::warn!(path = %path.display(), err = %error, "upload not removed");
        }
    }
}

/// Runs an import to its end. The digest is known only then; a failed one leaves nothing that anything refers to.
pub async fn run(import: Import, repository: Repository, core: Handle, work: Work) {
    let upload = Upload(import.remove_source.then(|| import.source.clone()));
    let new_revision = import.new_revision;
    let for_ingest = repository.clone();
    let (result, work) = match tokio::task::spawn_blocking(move || {
        let _upload = upload;
        let result = ingest(&import, &for_ingest, &work);
        (result, work)
    })
    .await
    {
        Ok(both) => both,
        // the work was dropped by the panic, which marked the job
        Err(error) => {
            tracing::error!(err = %error, "import panicked");
            return;
        }
    };
    let result = match result {
        Ok(image) => record(image, new_revision, &repository, &core).await,
        Err(refusal) => Err(refusal),
    };
    if let Err(refusal) = &result {
        tracing::warn!(code = %refusal.code, err = %refusal.detail, "import failed");
    }
    work.end(result);
}

/// Records an image whose bytes are in the repository; they go again when it is refused.
pub async fn record(
    image: StoredImage,
    new_revision: bool,
    repository: &Repository,
    core: &Handle,
) -> Result<serde_json::Value, Refusal> {
    let digest = image.digest;
    let added = core
        .call(move |core| {
            let image = core.add_image(image, new_revision)?;
            Ok(core.image_view(&image))
        })
        .await;
    match added {
        Ok(image) => {
            tracing::info!(image = %image.digest, name = image.name, revision = image.revision, "image imported");
            serde_json::to_value(image)
                .map_err(|error| Refusal::new(ErrorCode::Internal, format!("write the image as JSON: {error}")))
        }
        Err(refusal) => {
            forget_unknown(repository.clone(), core, digest).await;
            Err(refusal)
        }
    }
}

/// Reads every chunk and boot file of an image back; the repository compares each with its digest.
pub async fn verify(image: StoredImage, repository: Repository, work: Work) {
    let done = tokio::task::spawn_blocking(move || {
        let result = read_back(&image, &repository, &work);
        work.end(result);
    });
    // a panic dropped the work, which marked the job
    if let Err(error) = done.await {
        tracing::error!(err = %error, "verify panicked");
    }
}

fn read_back(image: &StoredImage, repository: &Repository, work: &Work) -> Result<serde_json::Value, Refusal> {
    let mut shown = 0;
    let report = repository.verify(&image.digest, &mut |at: Progress| {
        if at.done.0 >= shown || at.done == at.total {
            shown = at.done.0 + at.total.0 / 100;
            work.progress("verifying", at.done.0, at.total.0);
        }
        if work.is_wanted() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })?;
    if let Some(first) = report.bad.first() {
        let defect = match &first.defect {
            Defect::Missing => "is missing",
            Defect::Damaged => "is damaged",
            Defect::Unreadable(reason) => reason.as_str(),
        };
        let detail = format!(
            "image {} is not whole: {} of its chunks are bad, the first at offset {} {defect}; \
             importing the same content again repairs them",
            image.full_name(),
            report.bad.len(),
            first.offset
        );
        return Err(Refusal::new(ErrorCode::Corrupt, detail));
    }
    for file in [image.boot.kernel, image.boot.initrd].into_iter().flatten() {
        repository.blob(&file)?;
    }
    Ok(serde_json::json!({ "digest": image.digest, "chunks": report.chunks, "bytes": report.bytes }))
}

/// Takes an image's reference away and removes what nothing else uses, unless the content stands (again, or under another
/// name): then the reference is that one's too. Call with the permit of imports held, which record what they have stored.
pub async fn forget_unknown(repository: Repository, core: &Handle, digest: Digest) {
    let text = digest.to_string();
    let known = core.call(move |core| Ok(core.image(&text).is_ok())).await.unwrap_or(true);
    if !known {
        forget(repository, digest).await;
    }
}

async fn forget(repository: Repository, digest: Digest) {
    let done = tokio::task::spawn_blocking(move || {
        repository.forget_reference(&reference_of(&digest))?;
        repository.prune()
    })
    .await;
    match done {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => tracing::warn!(err = %muster_common::Chain(&error), "repository not pruned"),
        Err(error) => tracing::error!(err = %error, "prune panicked"),
    }
}

/// Removes what an import or a deletion left behind when the controller was killed in between: references to no known image.
/// Boot files that were uploaded for an import that never came go too.
pub async fn tidy(repository: Repository, core: Handle) {
    let Ok(known) = core.call(|core| Ok(core.images.keys().map(reference_of).collect::<Vec<_>>())).await else {
        return;
    };
    let done = tokio::task::spawn_blocking(move || {
        let left: Vec<String> = repository.references("")?.into_iter().filter(|name| !known.contains(name)).collect();
        for name in &left {
            tracing::info!(reference = name, "left behind in the repository, removed");
            repository.forget_reference(name)?;
        }
        if left.is_empty() { Ok(()) } else { repository.prune().map(drop) }
    })
    .await;
    match done {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(err = %muster_common::Chain(&error), "repository not tidied"),
        Err(error) => tracing::error!(err = %error, "tidying the repository panicked"),
    }
}

pub fn reference_of(digest: &Digest) -> String {
    format!("image.{digest}")
}

fn ingest(import: &Import, repository: &Repository, work: &Work) -> Result<StoredImage, Refusal> {
    let source = source::open_image(&import.source, source_format(import.format))?;
    let mut session = repository.session();
    let mut shown = 0;
    let ingested = session.ingest(&*source, &IngestOptions { estimate: true }, &mut |at: Progress| {
        // about a hundred steps: followers want a bar, not every MiB
        if at.done.0 >= shown || at.done == at.total {
            shown = at.done.0 + at.total.0 / 100;
            work.progress("importing", at.done.0, at.total.0);
        }
        if work.is_wanted() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })?;
    work.progress("storing", ingested.logical.0, ingested.logical.0);
    let mut blob = |file: &Option<BootFile>| -> Result<Option<Digest>, Refusal> {
        let bytes = match file {
            None => return Ok(None),
            Some(BootFile::Blob(digest)) => repository.blob(digest)?,
            Some(BootFile::Path(path)) => std::fs::read(path).map_err(|error| {
                let code = match error.kind() {
                    std::io::ErrorKind::NotFound => ErrorCode::NotFound,
                    std::io::ErrorKind::PermissionDenied => ErrorCode::PermissionDenied,
                    _ => ErrorCode::Io,
                };
                Refusal::new(code, format!("read boot file {}: {error}", path.display()))
            })?,
        };
        Ok(Some(session.put_blob(&bytes)?))
    };
    let boot =
        BootFiles { kernel: blob(&import.kernel)?, initrd: blob(&import.initrd)?, cmdline: import.cmdline.clone() };
    session.publish(&reference_of(&ingested.digest), &[])?;
    Ok(StoredImage {
        digest: ingested.digest,
        name: import.name.clone(),
        revision: 0,
        format: import.format,
        logical_bytes: ingested.logical.0,
        new_bytes: ingested.new_bytes.0,
        resident_estimate_bytes: ingested.resident.unwrap_or(ByteLen::ZERO).0,
        boot,
        imported_at_us: import.now_us,
        version: 1,
        parent: None,
        origin: String::new(),
    })
}

/// What a file would take in memory, alone and beside other images. Reads all of it, and all of them.
pub async fn estimate(
    path: PathBuf,
    format: ImageFormat,
    beside: Vec<StoredImage>,
    repository: Repository,
) -> Result<Estimate, Refusal> {
    let estimated = tokio::task::spawn_blocking(move || {
        let go = &mut |_| ControlFlow::Continue(());
        let source = source::open_image(&path, source_format(format))?;
        let alone = Estimator::new().add_beside(&*source, &repository, go)?;
        let added = if beside.is_empty() {
            alone.unknown
        } else {
            let mut estimator = Estimator::new();
            for image in &beside {
                estimator.add(&repository.reader(Arc::new(repository.manifest(&image.digest)?)), go)?;
            }
            estimator.add(&*source, go)?.added
        };
        Ok::<_, Refusal>(Estimate {
            logical_bytes: alone.estimate.logical.0,
            resident_bytes: alone.estimate.resident.0,
            added_bytes: Some(added.0),
            beside: beside.iter().map(StoredImage::full_name).collect(),
            new_bytes: Some(alone.new_bytes.0),
            too_large_for: Vec::new(),
        })
    })
    .await;
    estimated.map_err(|error| Refusal::new(ErrorCode::Internal, format!("estimate: {error}")))?
}
