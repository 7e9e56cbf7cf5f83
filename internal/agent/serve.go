package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/advice"
)

const (
	socketName = "agent.sock"
	statusPath = "/status"

	// answerTimeout bounds an answer: port use is counted over whole tables.
	answerTimeout = 10 * time.Second
	dialTimeout   = 2 * time.Second
)

// prepareRunDir makes the run directory. One that is there keeps its mode, since
// it may be somebody else's (--run-dir /tmp), but must not let others in to
// replace what is in it.
func prepareRunDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("run-dir: %w", err)
	}
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("run-dir: %w", err)
	}
	if !private(info) {
		return advice.New(fmt.Errorf("run-dir %s: other users can write to it", dir),
			"give --run-dir a directory of its own, for example "+DefaultRunDir, "chmod 700 "+dir)
	}
	return nil
}

// private tells whether nobody else can make files in a directory.
func private(info fs.FileInfo) bool {
	owner, ok := info.Sys().(*syscall.Stat_t)
	return info.Mode().Perm()&0o022 == 0 && (!ok || int(owner.Uid) == os.Geteuid())
}

// vacant refuses a run directory in which no socket can be made: that of another
// agent, or one that can't be written. It is asked before a data plane is made, so
// that what is refused leaves nothing behind.
func vacant(runDir string) error {
	path := filepath.Join(runDir, socketName)
	if info, err := os.Lstat(path); err == nil && info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("socket %s: something else is there", path)
	}
	var err error
	linger(func() bool {
		var conn net.Conn
		if conn, err = net.DialTimeout("unix", path, dialTimeout); err == nil {
			conn.Close()
		}
		return err == nil
	})
	switch {
	case err == nil:
		return advice.New(fmt.Errorf("socket %s: another agent is running", path), "stop it first, or give this one a --bpf-root and --run-dir of its own")
	case errors.Is(err, syscall.EINVAL):
		return advice.New(fmt.Errorf("socket %s: the path is too long", path), "give --run-dir a path of at most 90 letters")
	}
	if err := unix.Access(runDir, unix.W_OK|unix.X_OK); err != nil {
		return fmt.Errorf("run-dir %s: %w", runDir, err)
	}
	return nil
}

// linger asks again for half a second whether something is in use. A program that an agent was just
// starting when it was killed holds its sockets and locks for a moment, from fork to exec.
func linger(inUse func() bool) {
	const pause, tries = 100 * time.Millisecond, 5
	for range tries {
		if !inUse() {
			return
		}
		time.Sleep(pause)
	}
	inUse()
}

// listen makes the socket. It is born under another name and renamed, so that it
// never stands there with a mode that lets others in, and replaces a stale one.
func listen(runDir string) (net.Listener, error) {
	if err := vacant(runDir); err != nil {
		return nil, err
	}
	path := filepath.Join(runDir, socketName)
	tmp := path + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("socket: %w", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: tmp, Net: "unix"})
	if errors.Is(err, syscall.EINVAL) { // tmp is longer by four letters
		return nil, advice.New(fmt.Errorf("socket %s: the path is too long", path), "give --run-dir a path of at most 90 letters")
	}
	if err != nil {
		return nil, fmt.Errorf("socket: %w", err)
	}
	l.SetUnlinkOnClose(false) // it would unlink the first name
	err = os.Chmod(tmp, 0o600)
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		l.Close()
		os.Remove(tmp)
		return nil, fmt.Errorf("socket: %w", err)
	}
	return l, nil
}

// serve answers on l until ctx is done, then removes the socket.
func serve(ctx context.Context, l net.Listener, runDir string, status func() (Status, error), log *slog.Logger) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+statusPath, func(w http.ResponseWriter, _ *http.Request) {
		s, err := status()
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(s) // a client that went away misses nothing
	})
	server := &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: dialTimeout,
		ReadTimeout:       dialTimeout,
		WriteTimeout:      answerTimeout,
		IdleTimeout:       dialTimeout,
		MaxHeaderBytes:    4 << 10,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	stop := context.AfterFunc(ctx, func() { server.Close() })
	defer stop()
	defer os.Remove(filepath.Join(runDir, socketName))
	if err := server.Serve(l); ctx.Err() == nil {
		return fmt.Errorf("socket: %w", err)
	}
	return nil
}

// errNoAgent says that nobody listens on the socket.
var errNoAgent = errors.New("no agent")

// ask gets the status of the running agent.
func ask(runDir string, timeout time.Duration) (Status, error) {
	path := filepath.Join(runDir, socketName)
	dialer := net.Dialer{Timeout: dialTimeout}
	transport := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "unix", path)
		},
		DisableKeepAlives: true,
	}
	client := &http.Client{Transport: transport, Timeout: timeout}
	answer, err := client.Get("http://agent" + statusPath)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return Status{}, errNoAgent
	case errors.Is(err, context.DeadlineExceeded):
		return Status{}, fmt.Errorf("ask the agent: it listens on %s, but does not answer within %s", path, timeout)
	case err != nil:
		return Status{}, fmt.Errorf("ask the agent: %w", errors.Unwrap(err))
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		var text [512]byte
		n, _ := answer.Body.Read(text[:])
		return Status{}, fmt.Errorf("ask the agent: %s: %s", answer.Status, text[:n])
	}
	var s Status
	if err := json.NewDecoder(answer.Body).Decode(&s); err != nil {
		return Status{}, fmt.Errorf("ask the agent: %w", err)
	}
	return s, nil
}
