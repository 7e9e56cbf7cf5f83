package agent

import (
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"bauta.dev/bauta/internal/devices"
	"bauta.dev/bauta/internal/policy"
)

func TestPolicyFileRoundTrip(t *testing.T) {
	f := nodeFacts()
	f.nonMasq = []policy.Rule{{Prefix: netip.MustParsePrefix("10.0.0.0/8"), Origin: "file f"}}
	f.nodes = []policy.NodeAddr{{Addr: netip.MustParseAddr("192.0.2.9"), Node: "b", Type: policy.Hostname, Origin: "file n"}}
	cfg := load(t, "pod-cidrs=10.1.0.0/16,fd00:1::/64", "enable-ip-masq-agent=true", "unknown-protocols=drop",
		"remote-node-masquerade=external", "nat-timeout-udp=90s", "reserved-ports=40000")
	w := assemble(cfg, f)
	want, err := policy.Build(w.input)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	file := newPolicyFile(w)
	file.Written, file.PID = time.Now().UTC().Round(0), 7
	file.IPMasqAgent = IPMasqStatus{Enabled: true, State: "list"}
	for range 2 { // the second replaces the first
		if err := file.write(dir); err != nil {
			t.Fatal(err)
		}
	}
	back, err := ReadPolicyFile(dir)
	if err != nil {
		t.Fatal(err)
	}
	if !file.same(back) || !back.Written.Equal(file.Written) {
		t.Errorf("%+v\nwant %+v", back, file)
	}
	got, err := back.Policy()
	if err != nil {
		t.Fatal(err)
	}
	for _, part := range [][2]any{
		{got.Sources(), want.Sources()}, {got.Destinations(), want.Destinations()}, {got.Input().Ports, want.Input().Ports},
		{got.Input().Devices, want.Input().Devices}, {got.Input().Timeouts, want.Input().Timeouts},
		{got.Input().UnknownProtocols, want.Input().UnknownProtocols}, {got.Input().RemoteNodes, want.Input().RemoteNodes},
	} {
		if !reflect.DeepEqual(part[0], part[1]) {
			t.Errorf("%+v\nwant %+v", part[0], part[1])
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("%v %v, want policy.json only", entries, err)
	}
	if info, err := os.Stat(filepath.Join(dir, "policy.json")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v %v, want mode 0600", info.Mode(), err)
	}
}

// Every field of the input must be in the file: explain works from it.
func TestPolicyFileHasTheWholeInput(t *testing.T) {
	inFile := map[string]string{"IPv4": "State4", "IPv6": "State6"}
	in, file := reflect.TypeFor[policy.Input](), reflect.TypeFor[PolicyFile]()
	for i := range in.NumField() {
		name := in.Field(i).Name
		if other, ok := inFile[name]; ok {
			name = other
		}
		if _, ok := file.FieldByName(name); !ok {
			t.Errorf("policy.Input.%s has no field in PolicyFile", in.Field(i).Name)
		}
	}
}

func TestPolicyFileOfOthers(t *testing.T) {
	dir := t.TempDir()
	if _, err := ReadPolicyFile(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	for text, want := range map[string]string{`{"format":2}`: "format 2", `{`: "unexpected end"} {
		write(t, filepath.Join(dir, policyFileName), text)
		if _, err := ReadPolicyFile(dir); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", text, err, want)
		}
	}
	if err := newPolicyFile(wanted{selection: devices.Selection{}}).write(filepath.Join(dir, "none")); err == nil {
		t.Error("no error without a directory")
	}
}

func TestPortRanges(t *testing.T) {
	for _, text := range []string{"", "7", "7-8", "7,9", "1-3,9,20-65535"} {
		ports, err := PolicyFile{Ports: text}.ports()
		if err != nil {
			t.Fatal(err)
		}
		if got := portRanges(ports); got != text {
			t.Errorf("%q, want %q", got, text)
		}
	}
}
