"""What tests share: cases, engines, servers, emulators. Tests import it as ``support``."""
