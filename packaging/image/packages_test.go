package main

import (
	"strings"
	"testing"
)

func TestLock(t *testing.T) {
	l, err := readLock(lockText)
	if err != nil || l.date == "" {
		t.Fatalf("%+v, %v", l, err)
	}
	for _, arch := range []string{"amd64", "arm64"} {
		if got := len(l.of(arch)); got != len(debianLicenses) {
			t.Errorf("%s: %d packages, want %d", arch, got, len(debianLicenses))
		}
	}
	for _, line := range []string{"libc6 1 amd64 abc", "unheard-of 1 amd64 " + strings.Repeat("a", 64), "libc6"} {
		if _, err := readLock(line); err == nil {
			t.Errorf("%q: taken", line)
		}
	}
}

func TestSecurityMirror(t *testing.T) {
	for m, want := range map[string]string{
		mirror:                       "http://deb.debian.org/debian-security",
		"https://mirror.example/deb": "https://mirror.example/deb-security",
		"https://snapshot.debian.org/archive/debian/20260101T000000Z": "https://snapshot.debian.org/archive/debian-security/20260101T000000Z",
	} {
		if got := securityMirror(m); got != want {
			t.Errorf("%s: %s, want %s", m, got, want)
		}
	}
}
