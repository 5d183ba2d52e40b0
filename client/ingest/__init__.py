"""From a DICOM archive to the catalog and the cache."""
