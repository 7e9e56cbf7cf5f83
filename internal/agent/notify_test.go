package agent

import (
	"net"
	"os"
	"regexp"
	"strconv"
	"testing"
	"time"
)

func TestSystemd(t *testing.T) {
	path := newRunDir(t) + ".notify"
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	env := map[string]string{"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": strconv.Itoa(os.Getpid())}
	s := newSystemd(func(key string) string { return env[key] })
	defer s.close()
	if s.watchdog != 1500*time.Millisecond {
		t.Errorf("watchdog every %s", s.watchdog)
	}
	for _, c := range []struct {
		send func()
		want string
	}{
		{func() { s.reloading(); s.reloaded(); s.ready(); s.ready() }, `READY=1`}, // once
		{s.reloading, `RELOADING=1\nMONOTONIC_USEC=\d+`},
		{s.reloaded, `READY=1`},
		{func() { s.status("a\nb") }, `STATUS=a b`},
		{s.alive, `WATCHDOG=1`},
		{s.stopping, `STOPPING=1`},
	} {
		c.send()
		var buf [256]byte
		n, err := conn.Read(buf[:])
		if err != nil || !regexp.MustCompile("^"+c.want+"$").Match(buf[:n]) {
			t.Errorf("%q %v, want %s", buf[:n], err, c.want)
		}
	}
	env["WATCHDOG_PID"] = "1"
	other := newSystemd(func(key string) string { return env[key] })
	defer other.close()
	if other.watchdog != 0 {
		t.Error("took the watchdog of another process")
	}
	none := newSystemd(func(string) string { return "" })
	none.ready() // goes nowhere
	none.close()
}

// The agent must have told systemd before that gives up and starts it again.
func TestUnitWaitsForTheAgent(t *testing.T) {
	unit, err := os.ReadFile("../../packaging/systemd/bauta.service")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`(?m)^TimeoutStartSec=(\d+)$`).FindSubmatch(unit)
	if m == nil {
		t.Fatal("no TimeoutStartSec")
	}
	seconds, _ := strconv.Atoi(string(m[1]))
	if limit := time.Duration(seconds) * time.Second; limit < defaultTiming.patience+10*time.Second {
		t.Errorf("TimeoutStartSec is %s, the agent tells systemd after %s", limit, defaultTiming.patience)
	}
}
