package cluster

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// specEnv names the node that a process is to become, stageEnv how far it is.
const (
	specEnv  = "BAUTA_CLUSTER_NODE"
	stageEnv = "BAUTA_CLUSTER_STAGE"
)

// nodeSpec is what the first process of a node needs to know.
type nodeSpec struct {
	Name, Dir, Kube, Images, Cgroup string
	KubeletConfig, ProxyConfig      string // paths of kubeconfig files
	Addrs                           string // as the kubelet wants them
	Proxy                           string // kube-proxy's mode
}

// Become is the first thing that a program calls that starts clusters: nodes begin
// as the program itself. In a node it does not return.
func Become() {
	path := os.Getenv(specEnv)
	if path == "" {
		return
	}
	var s nodeSpec
	text, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(text, &s)
	}
	if err == nil && os.Getenv(stageEnv) == "" {
		err = s.enter()
	} else if err == nil {
		err = s.run()
	}
	fmt.Fprintf(os.Stderr, "node: %v\n", err)
	os.Exit(1)
}

// enter moves the process into its cgroups and makes them the root of its view.
// That belongs to a thread, so the program starts again in it.
func (s *nodeSpec) enter() error {
	runtime.LockOSThread()
	list, err := hierarchies()
	if err != nil {
		return err
	}
	if err := joinCgroups(list, s.Cgroup); err != nil {
		return err
	}
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("unshare cgroups: %w", err)
	}
	return unix.Exec("/proc/self/exe", os.Args, append(os.Environ(), stageEnv+"=run"))
}

// run is the life of a node's first process.
func (s *nodeSpec) run() error {
	os.Unsetenv(specEnv)
	os.Unsetenv(stageEnv)
	os.Setenv("TMPDIR", s.temp())
	if err := unix.Sethostname([]byte(s.Name)); err != nil {
		return fmt.Errorf("set host name: %w", err)
	}
	if err := s.mountNode(); err != nil {
		return err
	}
	r := newReaper()
	s.service(r, "containerd", "containerd", "-c", filepath.Join(s.Dir, "containerd.toml"))
	for { // its socket is there a moment before it serves
		if code, err := r.command(s.log("ctr"), "ctr", "version"); err == nil && code == 0 {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	images, err := filepath.Glob(filepath.Join(s.Images, "*.tar"))
	if err != nil {
		return err
	}
	slices.Sort(images)
	for _, image := range images {
		if code, err := r.command(s.log("ctr"), "ctr", "-n", "k8s.io", "images", "import", image); err != nil || code != 0 {
			return fmt.Errorf("import %s: exit code %d, %w (see ctr.log)", image, code, err)
		}
	}
	s.service(r, "kubelet", s.Kube, "kubelet", "--config="+filepath.Join(s.Dir, "kubelet.yaml"),
		"--kubeconfig="+s.KubeletConfig, "--hostname-override="+s.Name, "--node-ip="+s.Addrs)
	s.service(r, "kube-proxy", s.Kube, "kube-proxy", "--kubeconfig="+s.ProxyConfig,
		"--hostname-override="+s.Name, "--proxy-mode="+s.Proxy,
		fmt.Sprintf("--cluster-cidr=%s,%s", PodRange4, PodRange6),
		"--conntrack-max-per-core=0") // a setting of the whole machine
	select {} // until the harness kills it, and with it all that runs here
}

func (s *nodeSpec) log(name string) string { return filepath.Join(s.Dir, name+".log") }

// service keeps a component running, as a node's service manager does.
func (s *nodeSpec) service(r *reaper, name string, argv ...string) {
	go func() {
		for {
			code, err := r.command(s.log(name), argv...)
			fmt.Fprintf(os.Stderr, "%s %s ended: code %d, %v\n", time.Now().Format(time.TimeOnly), name, code, err)
			time.Sleep(time.Second)
		}
	}()
}

// reaper runs commands in the first process of a PID namespace, which is parent to
// all orphans, so that nobody may wait for one child only.
type reaper struct {
	mu      sync.Mutex
	waiting map[int]chan int
}

func newReaper() *reaper {
	r := &reaper{waiting: map[int]chan int{}}
	children := make(chan os.Signal, 1)
	signal.Notify(children, syscall.SIGCHLD)
	go func() {
		for range children {
			r.reap()
		}
	}()
	return r
}

func (r *reaper) reap() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
		if pid <= 0 || err != nil {
			return
		}
		if done := r.waiting[pid]; done != nil {
			done <- status.ExitStatus()
			delete(r.waiting, pid)
		}
	}
}

// command runs a program with its output appended to a file, and waits for its end.
func (r *reaper) command(log string, argv ...string) (code int, err error) {
	path, err := exec.LookPath(argv[0])
	if err != nil {
		return 0, err
	}
	out, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return 0, err
	}
	defer out.Close()
	done := make(chan int, 1)
	r.mu.Lock() // its end must not come before it is known
	p, err := os.StartProcess(path, argv, &os.ProcAttr{Files: []*os.File{nil, out, out}})
	if err == nil {
		r.waiting[p.Pid] = done
	}
	r.mu.Unlock()
	if err != nil {
		return 0, err
	}
	return <-done, nil
}
