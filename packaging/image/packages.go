package main

import (
	_ "embed"

	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"bauta.dev/bauta/internal/advice"
)

// debPackage is one of Debian's, in exactly one version.
type debPackage struct{ name, version, arch, sha256 string }

// String is how apt names it.
func (p debPackage) String() string {
	if p.arch == anyArch {
		return p.name + "=" + p.version
	}
	return p.name + ":" + p.arch + "=" + p.version
}

const anyArch = "all"

// suite is the release whose packages are used.
const suite = "trixie"

// debianLicenses are the packages, with the licenses of what is taken from each.
var debianLicenses = map[string]string{
	"base-files":              "GPL-2.0-or-later", // and the texts of the others' licenses
	"iptables":                "GPL-2.0-only AND GPL-2.0-or-later",
	"libc6":                   "LGPL-2.1-or-later",
	"libip4tc2":               "GPL-2.0-only AND GPL-2.0-or-later",
	"libip6tc2":               "GPL-2.0-only AND GPL-2.0-or-later",
	"libmnl0":                 "LGPL-2.1-or-later",
	"libnetfilter-conntrack3": "GPL-2.0-or-later",
	"libnfnetlink0":           "GPL-2.0-or-later",
	"libnftnl11":              "GPL-2.0-or-later",
	"libxtables12":            "GPL-2.0-only AND GPL-2.0-or-later",
	"netbase":                 "GPL-2.0-only",
}

//go:embed packages.lock
var lockText string

const lockFile = "packaging/image/packages.lock"

// lock says which versions an image is made of; without it a build next month would be another one.
type lock struct {
	date     string // of the search, in the form that Debian's snapshots are named by
	packages []debPackage
}

func readLock(text string) (lock, error) {
	var l lock
	for s := bufio.NewScanner(strings.NewReader(text)); s.Scan(); {
		f := strings.Fields(s.Text())
		switch {
		case len(f) == 2 && f[0] == "date":
			l.date = f[1]
		case len(f) == 4 && len(f[3]) == 2*sha256.Size && debianLicenses[f[0]] != "":
			l.packages = append(l.packages, debPackage{f[0], f[1], f[2], f[3]})
		case len(f) > 0 && !strings.HasPrefix(f[0], "#"):
			return lock{}, fmt.Errorf("%s: line %q: not a package with version, architecture and digest", lockFile, s.Text())
		}
	}
	return l, nil
}

func (l lock) of(arch string) []debPackage {
	var list []debPackage
	for _, p := range l.packages {
		if p.arch == arch || p.arch == anyArch {
			list = append(list, p)
		}
	}
	return list
}

// aptRoot is a configuration of apt for us alone: the machine's own is neither read nor changed.
type aptRoot struct{ dir string }

const (
	mirrorEnv = "BAUTA_DEBIAN_MIRROR"
	mirror    = "http://deb.debian.org/debian"
	keyring   = "/usr/share/keyrings/debian-archive-keyring.gpg"
)

func newAptRoot(ctx context.Context) (*aptRoot, error) {
	for _, tool := range []string{"apt-get", "apt-cache", "dpkg-deb"} {
		if _, err := exec.LookPath(tool); err != nil {
			return nil, advice.New(err, "packages are fetched with Debian's tools: run this on Debian or Ubuntu (tools/need image installs what is missing)")
		}
	}
	if _, err := os.Stat(keyring); err != nil {
		return nil, advice.New(err, "install debian-archive-keyring (tools/need image)")
	}
	dir, err := os.MkdirTemp("", "bauta-apt-")
	if err != nil {
		return nil, err
	}
	a := &aptRoot{dir}
	if err := a.init(ctx); err != nil {
		a.remove()
		return nil, err
	}
	return a, nil
}

func (a *aptRoot) remove() { os.RemoveAll(a.dir) }

func (a *aptRoot) init(ctx context.Context) error {
	for _, d := range []string{"etc/apt.conf.d", "etc/preferences.d", "etc/sources.list.d", "etc/trusted.gpg.d", "state/lists/partial", "cache/archives/partial"} {
		if err := os.MkdirAll(filepath.Join(a.dir, d), 0o755); err != nil {
			return err
		}
	}
	conf := fmt.Sprintf(`Dir::Etc "%[1]s/etc/"; Dir::State "%[1]s/state/"; Dir::State::status "%[1]s/status"; Dir::Cache "%[1]s/cache/";
APT::Architecture "amd64"; APT::Architectures { "amd64"; "arm64"; }; APT::Sandbox::User "root"; Acquire::Languages "none";
`, a.dir)
	m := mirror
	if own := os.Getenv(mirrorEnv); own != "" {
		m = strings.TrimSuffix(own, "/")
		conf += `Acquire::Check-Valid-Until "false";` + "\n" // an old snapshot; digests are checked
	}
	sources := fmt.Sprintf("deb [signed-by=%[1]s] %[2]s %[3]s main\ndeb [signed-by=%[1]s] %[4]s %[3]s-security main\n",
		keyring, m, suite, securityMirror(m))
	for name, text := range map[string]string{"apt.conf": conf, "status": "", "etc/sources.list": sources} {
		if err := os.WriteFile(filepath.Join(a.dir, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	_, err := a.run(ctx, a.dir, "apt-get", "-qq", "update")
	return err
}

// securityMirror stands beside the archive's, on mirrors and in the snapshots.
func securityMirror(m string) string {
	if before, after, ok := strings.Cut(m+"/", "/debian/"); ok {
		return strings.TrimSuffix(before+"/debian-security/"+after, "/")
	}
	return m + "-security"
}

func (a *aptRoot) run(ctx context.Context, dir, tool string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, tool, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "APT_CONFIG="+filepath.Join(a.dir, "apt.conf"), "LC_ALL=C")
	return output(cmd)
}

// fetchPackages returns a folder with NAME.deb for each package, from the cache where it has them.
func fetchPackages(ctx context.Context, l lock, arch string) (map[string]string, error) {
	cache, err := cacheDir()
	if err != nil {
		return nil, err
	}
	files := make(map[string]string)
	var missing []debPackage
	for _, p := range l.of(arch) {
		files[p.name] = filepath.Join(cache, p.sha256+".deb")
		if checkDigest(files[p.name], p.sha256) != nil {
			missing = append(missing, p)
		}
	}
	if len(missing) == 0 {
		return files, nil
	}
	a, err := newAptRoot(ctx)
	if err != nil {
		return nil, err
	}
	defer a.remove()
	for _, p := range missing {
		if err := a.download(ctx, p, files[p.name]); err != nil {
			return nil, advice.New(fmt.Errorf("package %s: %w", p, err),
				"Debian has a newer version and the mirror dropped this one: build from the snapshot, "+mirrorEnv+"=https://snapshot.debian.org/archive/debian/"+l.date,
				"or take the newest versions: go run ./packaging/image -update-packages")
		}
	}
	return files, nil
}

func cacheDir() (string, error) {
	base := os.Getenv("BAUTA_CACHE")
	if base == "" {
		home, err := os.UserCacheDir()
		if err != nil {
			return "", err
		}
		base = filepath.Join(home, "bauta")
	}
	dir := filepath.Join(base, "packages")
	return dir, os.MkdirAll(dir, 0o755)
}

func (a *aptRoot) download(ctx context.Context, p debPackage, to string) error {
	dir, err := os.MkdirTemp(filepath.Dir(to), "download-") // on one file system with the cache
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if _, err := a.run(ctx, dir, "apt-get", "-qq", "download", p.String()); err != nil {
		return err
	}
	found, err := filepath.Glob(filepath.Join(dir, "*.deb"))
	if err != nil || len(found) != 1 {
		return errors.Join(err, fmt.Errorf("apt-get download gave %d files", len(found)))
	}
	if err := checkDigest(found[0], p.sha256); err != nil {
		return err
	}
	return os.Rename(found[0], to)
}

func checkDigest(file, want string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return err
	}
	if got := hex.EncodeToString(h.Sum(nil)); got != want {
		return fmt.Errorf("digest %s, want %s", got, want)
	}
	return nil
}

// updateLock writes down the newest versions that Debian's stable release and its security archive have.
func updateLock(ctx context.Context, root string, now time.Time) error {
	a, err := newAptRoot(ctx)
	if err != nil {
		return err
	}
	defer a.remove()
	var b strings.Builder
	fmt.Fprintf(&b, "# Debian's packages in the iptables image: name, version, architecture, SHA-256 of the package.\n# Written by: go run ./packaging/image -update-packages\ndate %s\n", now.UTC().Format("20060102T150405Z"))
	var names []string
	for name := range debianLicenses {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		for _, arch := range []string{"amd64", "arm64"} {
			out, err := a.run(ctx, a.dir, "apt-cache", "show", "--no-all-versions", name+":"+arch)
			if err != nil {
				return err
			}
			if arch == "arm64" && out == "" { // one package for all, listed under the first
				continue
			}
			version, sum := field(out, "Version"), field(out, "SHA256")
			if version == "" || sum == "" {
				return fmt.Errorf("package %s:%s: no version or digest in apt's list", name, arch)
			}
			fmt.Fprintf(&b, "%s %s %s %s\n", name, version, field(out, "Architecture"), sum)
		}
	}
	return replace(filepath.Join(root, lockFile), func(w io.Writer) error { _, err := io.WriteString(w, b.String()); return err })
}

// field is that of a package's description.
func field(text, name string) string {
	for line := range strings.Lines(text) {
		if v, ok := strings.CutPrefix(line, name+": "); ok {
			return strings.TrimSpace(v)
		}
	}
	return ""
}
