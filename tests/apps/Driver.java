/**
 * A driver without Spark: it starts in a second, where PySpark takes several.
 *
 * No JDK is needed: Spark brings the Janino compiler, whose main class org.codehaus.janino.SimpleCompiler
 * compiles and runs a source file. Arguments: seconds to sleep, or the path of a file to wait for; exit code.
 */
public class Driver {
    public static void main(String[] arguments) throws Exception {
        if (arguments[0].startsWith("/")) {
            while (!new java.io.File(arguments[0]).exists()) {
                Thread.sleep(200);
            }
        } else {
            System.out.println("sleeping " + arguments[0] + " s");
            Thread.sleep((long) (1000 * Double.parseDouble(arguments[0])));
        }
        System.err.println("exiting with " + arguments[1]);
        System.exit(Integer.parseInt(arguments[1]));
    }
}
